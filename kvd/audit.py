"""All invariants of a pool, checked in slices while it serves.

What holds at any moment (a node against its parent, its pages, its holders) is asserted as the
slices pass. Sums over the whole pool, and that each page is in exactly one place, hold only if
nothing changed meanwhile: then they are compared too, and the audit is complete; on a busy pool it
tries a few times and says that it was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvd.cache import CacheManager
from kvd.node import Node
from kvd.session import Session
from kvd.tree_check import check_node
from kvd_shared.refs import refs_from_bytes

NODES_A_SLICE = 20
NODE_PAGES_A_SLICE = 4000
OWN_PAGES_A_SLICE = 2000
FREE_PAGES_A_SLICE = 20_000
ATTEMPTS = 3


def audit(cache: CacheManager) -> Generator[None, None, dict[str, Any]]:
    complete, attempt = False, 0
    try:
        while not complete and attempt < ATTEMPTS:
            attempt += 1
            complete = yield from _pass(cache)
    except AssertionError as e:
        finding = str(e) or "an invariant does not hold"
        return {"ok": False, "finding": finding, "complete": complete}
    return {"ok": True, "finding": None, "complete": complete}


@dataclass(slots=True)
class Sums:
    """Pages of the tree, as the tree counts them, and holds on them."""

    in_tree: int = 0
    evictable: int = 0
    held: int = 0
    shared: int = 0
    holds: int = 0
    detached: int = 0

    def add(self, node: Node) -> None:
        pages = node.num_pages
        self.in_tree += pages
        self.evictable += 0 if node.protected else pages
        if node.holders:
            self.held += pages
            self.shared += pages if len(node.holders) > 1 else 0
            self.holds += pages * sum(node.holders.values())
            self.detached += 0 if node.root.live else pages

    @classmethod
    def kept(cls, cache: CacheManager) -> Sums:
        tree = cache.tree
        return cls(
            tree.num_pages,
            tree.num_evictable,
            tree.num_held,
            tree.num_shared,
            tree.num_holds,
            tree.num_detached,
        )


def _pass(cache: CacheManager) -> Generator[None, None, bool]:
    """Returns whether sums could be compared."""
    began, tree = _changes(cache), cache.tree
    places = np.zeros(cache.num_pages, dtype=np.uint8)  # in how many each page was seen
    sums, room = Sums(), NODE_PAGES_A_SLICE
    for slot in range(len(tree.nodes_by_slot)):
        node = tree.nodes_by_slot[slot]
        if node is not None:
            check_node(tree, node)
            _check_holders(cache, node)
            refs = refs_from_bytes(bytes(node.refs))
            assert cache.free_list.all_current(refs), f"{node} has a stale page"
            places[refs & 0xFFFF_FFFF] += 1
            sums.add(node)
            room -= node.num_pages + len(node.children)
        room -= NODE_PAGES_A_SLICE // NODES_A_SLICE
        if room <= 0:
            room = NODE_PAGES_A_SLICE
            yield
    cache.queue.check()
    cache.announcements.check()
    yield
    for session in list(cache.sessions.values()):
        for own in (session.writing, session.leased):
            refs_before = tuple(own)
            for start in range(0, len(refs_before), OWN_PAGES_A_SLICE):
                still = [r for r in refs_before[start : start + OWN_PAGES_A_SLICE] if r in own]
                _check_private(cache, session, still, places)
                yield
    _check_private(cache, "nobody", cache.sealed, places)
    _check_sealed(cache)
    yield
    for start in range(0, len(cache.free_list), FREE_PAGES_A_SLICE):
        free = cache.free_list.slice(start, start + FREE_PAGES_A_SLICE)
        assert cache.free_list.all_current(free), "a free page has a stale generation"
        assert not tree.slots[free & 0xFFFF_FFFF].any(), "a free page is in the tree"
        places[free & 0xFFFF_FFFF] += 1
        yield
    if _changes(cache) != began:
        return False
    astray = np.flatnonzero(places != 1)
    assert not len(astray), (
        f"{len(astray)} pages are not in exactly one place, the first is page {astray[0]}, in "
        f"{places[astray[0]]}"
    )
    kept = Sums.kept(cache)
    assert sums == kept, f"counted {sums}, kept {kept}"
    return True


def _changes(cache: CacheManager) -> tuple[int, ...]:
    """Differs when something may have changed in between. What operators retain ends by time."""
    return cache.num_changes, *cache.operator.retained


def _check_holders(cache: CacheManager, node: Node) -> None:
    for session in node.holders:
        known = cache.sessions.get(session.id)
        assert known is session, f"{session} is gone and holds pages"


def _check_private(
    cache: CacheManager, owner: Session | str, refs: Iterable[int], places: np.ndarray[Any, Any]
) -> None:
    ids = np.fromiter(refs, dtype=np.int64)
    assert cache.free_list.all_current(ids), f"{owner} has a stale page"
    pages = ids & 0xFFFF_FFFF
    assert not cache.tree.slots[pages].any(), f"{owner} owns a page of the tree"
    places[pages] += 1


def _check_sealed(cache: CacheManager) -> None:
    holds: Counter[int] = Counter()
    for session in cache.sessions.values():
        holds.update(session.sealed)
    kept = {ref: count for ref, (_, count) in cache.sealed.items()}
    assert holds == kept, f"holds of sealed pages: sessions have {dict(holds)}, kept {kept}"
