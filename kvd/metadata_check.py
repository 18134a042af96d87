"""Whether the metadata says exactly what the cache says. O(pages): for tests."""

from __future__ import annotations

import math

import numpy as np

from kvd.cache import CacheManager
from kvd.metadata import LIVE, Metadata
from kvd.metadata.page_states import DOOMED, FREE, IN_TREE, OUTSIDE, UNRECORDED
from kvd.metadata.records import BORN, DURATION, INFO, NO_PARENT, PARENT, ROOT, TOKENS, TTL
from kvd.metadata.scan import scan
from kvd.node import NEVER, Node
from kvd.recovery import RECOVERY
from kvd.retention import DEFAULT_PRIORITY
from kvd_shared.refs import page_of, refs_from_bytes


def check_metadata(cache: CacheManager) -> None:
    """Raises AssertionError, with the numbers, at the first thing in which they differ."""
    meta = cache.meta
    assert cache.free_list._current is meta.pages.current
    if not meta.geometry.recorded:
        return
    owners: dict[int, int] = {page_of(ref): FREE for ref in cache.free_list.check().tolist()}
    for session in cache.sessions.values():
        for ref in (*session.writing, *session.leased):
            owners[page_of(ref)] = session.id
    for ref in cache.sealed:
        owners[page_of(ref)] = OUTSIDE
    matchable: set[int] = set()
    for node in cache.tree.nodes():
        pages = (refs_from_bytes(bytes(node.refs)) & 0xFFFF_FFFF).tolist()
        if _is_matchable(cache, node):
            for page in pages:
                owners[page] = IN_TREE if node.root.id else UNRECORDED
            if node.root.id:
                matchable.update(pages)
                _check_rows(cache, node)
            continue
        for page in pages:  # the scan sees that none comes back
            owner = owners[page] = meta.pages.owner_of(page)
            assert owner in (IN_TREE, UNRECORDED, DOOMED), f"{node} has a page of {owner:#x}"
    found = dict(enumerate(meta.pages.owners().tolist()))
    differ = {p: (found[p], owners.get(p)) for p in found if found[p] != owners.get(p)}
    assert not differ, f"owners by page (metadata, cache): {differ}"
    _check_scan(cache, matchable)


def _is_matchable(cache: CacheManager, node: Node) -> bool:
    top = node
    while top.parent is not None:
        top = top.parent
    root = cache.tree.roots.get(node.namespace)
    return root is not None and root.top is top


def _check_rows(cache: CacheManager, node: Node) -> None:
    refs = refs_from_bytes(bytes(node.refs))
    pages = refs & 0xFFFF_FFFF
    records = cache.meta.records
    assert records.are_intact(pages).all(), f"{node} has a row that is not whole"
    rows = records.rows[pages]
    assert (rows[:, ROOT] == node.root.id).all(), f"{node} is under another root"
    above = node.parent.last_ref if node.parent else None
    parents = [NO_PARENT if above is None else above, *refs[:-1].tolist()]
    assert rows[:, PARENT].view(np.int64).tolist() == parents, f"{node} is behind other pages"
    tokens = rows[:, TOKENS:].view(np.uint8)[:, : cache.tree.page_token_bytes].tobytes()
    assert tokens == bytes(node.tokens), f"{node} has other tokens"
    info, wish = rows[:, INFO], node.retention
    assert ((info & np.uint64(0xFFFF_FFFF)) == node.publisher & 0xFFFF_FFFF).all()
    assert (((info >> np.uint64(32)) & np.uint64(0xFFFF)) == cache.page_size).all()
    priorities = set(((info >> np.uint64(48)) & np.uint64(0xFF)).tolist())
    durations = set(rows[:, DURATION].view(np.float64).tolist())
    ttls = {_none(s) for s in rows[:, TTL].view(np.float64).tolist()}
    assert ttls == {wish.ttl_s}, f"{node} lives {ttls}"
    decayed = node.priority == DEFAULT_PRIORITY and node.priority_until_s == NEVER
    if not decayed:
        assert priorities == {wish.priority}, f"{node} has priority {priorities}"
        assert {_none(s) for s in durations} == {wish.duration_s}
    assert np.isfinite(rows[:, BORN].view(np.float64)).all()  # a node knows but a mean, cut or not


def _check_scan(cache: CacheManager, matchable: set[int]) -> None:
    """What would come back of a copy, if nothing had expired."""
    copy = Metadata(bytearray(cache.meta.to_bytes()), cache.meta.geometry)
    known = copy.sessions.load()
    if any((s.writing or s.leased) and s.id not in known for s in cache.sessions.values()):
        return  # opened without a process: only tests do
    found = scan(copy, -math.inf, lambda namespace: None)
    assert set(found.matchable.tolist()) == matchable
    roots = {root.id: root.namespace for root in cache.tree.roots.values() if root.id}
    assert found.roots == roots, f"roots (metadata, cache): {found.roots}, {roots}"
    versions: dict[str | None, int] = {}
    versions.update(cache.versions.minimums)
    if cache.versions.minimum:
        versions[None] = cache.versions.minimum
    assert found.weights == versions
    tails = {page_of(ref): tokens for ref, (tokens, _) in cache.sealed.items()}
    assert {page: found.tails.get(page, 0) for page in tails} == tails
    for session_id, entry in found.sessions.items():
        session = cache.sessions[session_id]
        live = entry.state == LIVE
        awaited = live and session.ended and RECOVERY in cache.sessions
        assert awaited or session.ended != live, f"{session} is recorded otherwise"


def _none(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds
