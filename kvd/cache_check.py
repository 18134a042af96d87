"""The invariants of a whole pool, asserted. O(pages): for tests; `audit` does it in slices."""

from __future__ import annotations

from collections import Counter

from kvd.cache import CacheManager
from kvd.metadata_check import check_metadata
from kvd.tree_check import check_tree
from kvd_shared.refs import page_of, refs_from_bytes


def check_cache(cache: CacheManager) -> None:
    """Raises AssertionError, with the numbers, at the first invariant that does not hold."""
    check_tree(cache.tree)
    cache.queue.check()
    cache.announcements.check()
    check_metadata(cache)
    places: Counter[int] = Counter()
    for ref in cache.free_list.check().tolist():
        places[page_of(ref)] += 1
    in_tree = 0
    for node in cache.tree.nodes():
        for ref in refs_from_bytes(bytes(node.refs)).tolist():
            assert cache.free_list.is_current(ref), f"node {node.id} has a stale {page_of(ref)}"
            places[page_of(ref)] += 1
            in_tree += 1
        for session in node.holders:
            assert cache.sessions.get(session.id) is session, f"{session} is gone and holds pages"
    private = len(cache.sealed)
    for ref in cache.sealed:
        assert cache.free_list.is_current(ref)
        places[page_of(ref)] += 1
    sealed: Counter[int] = Counter()
    for session in cache.sessions.values():
        sealed.update(session.sealed)
        for own in (session.writing, session.leased):
            for ref, count in own.items():
                assert count > 0 and cache.free_list.is_current(ref)
                places[page_of(ref)] += 1
                private += 1
        for node in session.nodes:
            assert node.holders.get(session, 0) > 0, f"{session} lists a node it does not hold"
        requests = cache.queue.of_session(session)
        assert session.ended or session.num_requests == len(requests)
    assert sealed == {ref: holds for ref, (_, holds) in cache.sealed.items()}
    twice = [page for page, count in places.items() if count > 1]
    assert not twice, f"pages in two places: {twice[:8]}"
    free = len(cache.free_list)
    assert free + in_tree + private == cache.num_pages == len(places), (
        f"{free} free + {in_tree} in the tree + {private} private != {cache.num_pages} pages"
    )
