"""What must come back, said page by page in plain Python: the brute-force twin of the scan."""

from __future__ import annotations

from dataclasses import dataclass

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.metadata import ColdStart, Metadata
from kvd.metadata.records import BORN
from kvd.node import Node
from kvd.options import CacheOptions
from kvd.recovery import Recovery, recover
from kvd_shared.namespace import Namespace
from kvd_shared.refs import page_of, refs_from_bytes

Path = tuple[Namespace, tuple[int, ...], bytes]  # pages from the prompt's start, and their tokens


@dataclass(frozen=True)
class Truth:
    """Of one moment of a history."""

    matchable: dict[int, Path]  # by reference: what it stands for; live roots, unexpired
    used: dict[int, int]  # reference -> session that has it to itself
    held: frozenset[int]  # references that some session holds, in the tree or sealed
    free: frozenset[int]
    tails: dict[int, int]


def truth(cache: CacheManager, now: float) -> Truth:
    matchable: dict[int, Path] = {}
    for root in cache.tree.roots.values():
        if not cache.versions.is_stale(root.namespace) and root.id:
            for node in root.top.children.values():
                _descend(cache, node, (), b"", now, matchable)
    held = {
        ref
        for session in cache.sessions.values()
        for node in session.nodes
        for ref in refs_from_bytes(bytes(node.refs)).tolist()
    }
    return Truth(
        matchable,
        {
            ref: session.id
            for session in cache.sessions.values()
            for ref in (*session.writing, *session.leased)
        },
        frozenset(held | cache.sealed.keys()),
        frozenset(cache.free_list.check().tolist()),
        {ref: tokens for ref, (tokens, _) in cache.sealed.items()},
    )


def _descend(
    cache: CacheManager,
    node: Node,
    pages: tuple[int, ...],
    tokens: bytes,
    now: float,
    found: dict[int, Path],
) -> None:
    step = cache.tree.page_token_bytes
    for i, ref in enumerate(refs_from_bytes(bytes(node.refs)).tolist()):
        born_s = float(cache.meta.records.rows[page_of(ref), BORN : BORN + 1].view("f8")[0])
        ttl_s = node.retention.ttl_s
        if ttl_s is None:
            ttl_s = node.root.tenant.ttl_s
        if ttl_s is not None and born_s + ttl_s <= now:
            return
        pages = (*pages, ref)
        tokens += bytes(node.tokens[i * step : (i + 1) * step])
        found[ref] = (node.namespace, pages, tokens)
    for child in node.children.values():
        _descend(cache, child, pages, tokens, now, found)


def restarted(
    raw: bytes, like: CacheManager, options: CacheOptions, now: float
) -> tuple[CacheManager, Recovery] | None:
    """A new cache from a copy of the metadata; None: cold."""
    meta = Metadata(bytearray(raw), like.meta.geometry)
    try:
        meta.header.check(meta.geometry)
        meta.header.warm_start_begins()
        cache = CacheManager(like.num_pages, like.page_size, options, meta)
        recovery = recover(cache, now)
    except ColdStart:
        return None
    check_cache(cache)
    return cache, recovery


def paths(cache: CacheManager) -> dict[int, Path]:
    """What can be matched now, by reference."""
    found: dict[int, Path] = {}
    for root in cache.tree.roots.values():
        for node in root.top.children.values():
            _descend(cache, node, (), b"", -1e9, found)
    return found
