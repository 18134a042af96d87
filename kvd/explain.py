"""Why a match stops where it does, found by asking what else is there or was. For admins."""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice
from typing import Any

from kvd.cache import CacheManager
from kvd.departures import Place
from kvd.node import Node
from kvd.prefix import common_units
from kvd.tree_reading import Walk
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES

MAX_NAMESPACES = 1000  # asked for the same tokens, at most
NAMESPACES_A_SLICE = 50


def explain(
    cache: CacheManager, namespace: Namespace, tokens: bytes, now: float
) -> Generator[None, None, dict[str, Any]]:
    """`why` is one of: `limit` (all but the last token, or its page, match), `page_boundary` (all
    whole pages match, less than one is left), `stale_version`, `computing` (another request has
    announced what follows), what became of the page that was there (`evicted`, `over_share`,
    `expired`, `flushed`, `stale_version`, with when), `differs` (a cached prompt goes on with
    another token at `differs_at`), `other_namespace` (it is cached for another salt, adapter,
    version or model), `never_published` (as far as is known)."""
    num_tokens = len(tokens) // TOKEN_BYTES
    limit = (num_tokens - 1) // cache.page_size
    walk = cache.tree.walk(namespace, tokens, limit, now)
    matched = walk.num_pages * cache.page_size
    found: dict[str, Any] = {
        "num_tokens": num_tokens,
        "matched_tokens": matched,
        "stopped_at_page": walk.num_pages,
        "differs_at": None,
        "left_s_ago": None,
        "unused_before_s": None,
        "computed_by": None,
        "other": None,
    }
    if walk.num_pages == limit:
        whole = num_tokens % cache.page_size in (0, 1)
        return found | {"why": "limit" if whole else "page_boundary"}
    if cache.versions.is_stale(namespace):
        return found | {"why": "stale_version"}
    pending = cache.announcements.pending(namespace, tokens, limit, walk.num_pages, now)
    if pending is not None:
        request = pending.announcement.request
        by = {"session": request.session.id, "request": request.number, "tokens": pending.tokens}
        return found | {"why": "computing", "computed_by": by}
    departure = cache.tree.departures.at(_place(cache, namespace, tokens, walk))
    if departure is not None:
        return found | {
            "why": departure.reason,
            "left_s_ago": now - departure.when_s,
            "unused_before_s": departure.when_s - departure.last_use_s,
        }
    partial = cache.tree.partial(walk, tokens, num_tokens, now)
    if partial is not None:
        same = _same_tokens(cache, partial[0], partial[1], tokens)
        return found | {"why": "differs", "differs_at": matched + same}
    last = walk.spans[-1].node if walk.spans else None
    goes_on = last is not None and (last.end > walk.num_pages or len(last.children) > 0)
    other = yield from _other(cache, namespace, tokens, matched, now)
    if other is not None:
        return found | {"why": "other_namespace", "other": other}
    if goes_on:
        return found | {"why": "differs", "differs_at": matched}
    return found | {"why": "never_published"}


def _place(cache: CacheManager, namespace: Namespace, tokens: bytes, walk: Walk) -> Place:
    """Where the page would be that the match misses."""
    step, at = cache.tree.page_token_bytes, walk.num_pages
    key = tokens[at * step : (at + 1) * step]
    if not at:
        return namespace, key
    return int.from_bytes(walk.spans[-1].refs[-8:], "little"), key


def _same_tokens(cache: CacheManager, node: Node, place: int, tokens: bytes) -> int:
    start = (place - node.depth) * cache.tree.page_token_bytes
    at = place * cache.tree.page_token_bytes
    limit = min(cache.page_size, (len(tokens) - at) // TOKEN_BYTES)
    return common_units(node.tokens, start, tokens, at, limit, TOKEN_BYTES)


def _other(
    cache: CacheManager, namespace: Namespace, tokens: bytes, matched: int, now: float
) -> Generator[None, None, dict[str, Any] | None]:
    """The other namespace that has most of these tokens, if it has more."""
    best: Namespace | None = None
    most = matched // cache.page_size
    limit = (len(tokens) // TOKEN_BYTES - 1) // cache.page_size
    for asked, other in enumerate(list(islice(cache.tree.roots, MAX_NAMESPACES))):
        if asked % NAMESPACES_A_SLICE == NAMESPACES_A_SLICE - 1:
            yield
        if other == namespace:
            continue
        pages = cache.tree.walk(other, tokens, limit, now).num_pages
        if pages > most:
            best, most = other, pages
    if best is None:
        return None
    fields = ("model", "weights_version", "adapter", "salt")
    return {
        "matched_tokens": most * cache.page_size,
        "differs_in": [f for f in fields if getattr(best, f) != getattr(namespace, f)],
        "model": best.model,
        "weights_version": best.weights_version,
    }
