"""One state a page, and how many pages are in each: what `pages` and `status` show.

Generators: the daemon goes on serving between two slices, so a map is a picture of a moving thing.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt

from kvd.cache import CacheManager
from kvd.node import Node
from kvd.session import Session
from kvd_shared.page_state import PageState

NODES_A_SLICE = 1000
PAGES_A_SLICE = 100_000
OWN_PAGES_A_SLICE = 4000  # of a session's own, which lie in dicts
States = npt.NDArray[np.uint8]


def page_states(cache: CacheManager) -> Generator[None, None, States]:
    slots = len(cache.tree.nodes_by_slot)
    by_slot = np.zeros(slots, dtype=np.uint8)
    for start in range(0, slots, NODES_A_SLICE):
        nodes = cache.tree.nodes_by_slot[start : start + NODES_A_SLICE]
        by_slot[start : start + len(nodes)] = [_state(node) for node in nodes]
        yield
    states = np.zeros(cache.num_pages, dtype=np.uint8)
    for start in range(0, cache.num_pages, PAGES_A_SLICE):
        stop = start + PAGES_A_SLICE
        # a slot that is newer than `by_slot` shows as its last one
        np.take(by_slot, cache.tree.slots[start:stop], mode="clip", out=states[start:stop])
        yield
    # the living last: what one of them holds as well is not quarantined
    for session in sorted(cache.sessions.values(), key=lambda s: not s.ended):
        for own, state in (
            (session.writing, PageState.WRITING),
            (session.leased, PageState.LEASED),
            (session.sealed, PageState.DUPLICATE),
        ):
            refs = tuple(own)
            for start in range(0, len(refs), OWN_PAGES_A_SLICE):
                piece = np.array(refs[start : start + OWN_PAGES_A_SLICE], dtype=np.int64)
                states[piece & 0xFFFF_FFFF] = PageState.QUARANTINED if session.ended else state
                yield
    return states


def page_counts(cache: CacheManager) -> Generator[None, None, dict[str, int]]:
    """They sum to the pool's pages. From counters, but for what ended sessions hold: of them there
    are few. `active` are all that a living session holds: shared and detached ones, too."""
    tree = cache.tree
    ended = [s for s in cache.sessions.values() if s.ended]
    quarantined = 0
    for session in ended:
        nodes = list(session.nodes)
        for start in range(0, len(nodes), NODES_A_SLICE):
            for node in nodes[start : start + NODES_A_SLICE]:
                # once, of several ended ones that hold it
                if next(iter(node.holders), None) is session and _only_ended(node):
                    quarantined += node.num_pages
            yield
    live = [s for s in cache.sessions.values() if not s.ended]
    orphans = {ref for s in ended for ref in s.sealed if not any(ref in o.sealed for o in live)}
    writing, leased = sum(len(s.writing) for s in live), sum(len(s.leased) for s in live)
    free, duplicate = len(cache.free_list), len(cache.sealed) - len(orphans)
    quarantined = min(quarantined, tree.num_held)  # some may have come back since
    private = cache.num_pages - free - tree.num_pages - writing - leased - duplicate
    return {
        "free": free,
        "leased": leased,
        "writing": writing,
        "active": tree.num_held - quarantined,
        "cached": tree.num_pages - tree.num_held,
        "duplicate": duplicate,
        "quarantined": quarantined + private,
    }


def state_of(cache: CacheManager, ref: int) -> PageState:
    """Of one page, by its current reference."""
    node = cache.tree.node_of(ref)
    if node is not None:
        return _state(node)
    owners = [s for s in cache.sessions.values() if s.own(ref) is not None]
    if not owners:
        return PageState.FREE
    alive = next((s for s in owners if not s.ended), None)
    return PageState.QUARANTINED if alive is None else _own_state(alive, ref)


def _own_state(session: Session, ref: int) -> PageState:
    if ref in session.writing:
        return PageState.WRITING
    return PageState.LEASED if ref in session.leased else PageState.DUPLICATE


def _only_ended(node: Node) -> bool:
    return all(session.ended for session in node.holders)


def _state(node: Node | None) -> PageState:
    if node is None:
        return PageState.FREE
    if not node.holders:
        return PageState.CACHED
    live = sum(not session.ended for session in node.holders)
    if not live:
        return PageState.QUARANTINED
    if not node.root.live:
        return PageState.DETACHED
    return PageState.ACTIVE if live == 1 else PageState.SHARED
