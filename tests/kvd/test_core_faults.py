"""Faults that the cache core had once; each story is as short as it can be told."""

from __future__ import annotations

from array import array

import pytest

from kvd.cache import NO_OPTIONS, CacheManager
from kvd.cache_check import check_cache
from kvd.options import CacheOptions, Limits
from kvd.retention import NO_WISH, Retention
from kvd.session import Session
from kvd_shared.errors import BadRequest, OverLimit, StaleVersion
from kvd_shared.namespace import Namespace
from tests.kvd.agreement import Told
from tests.kvd.tokens import page_tokens, unpacked

MAIN = Namespace(model="m")
PAGE_SIZE = 8


def a_pool(num_pages: int, options: CacheOptions = NO_OPTIONS) -> tuple[CacheManager, Session]:
    cache = CacheManager(num_pages, PAGE_SIZE, options)
    return cache, cache.open_session(1, "one", 0.0)


def cached(cache: CacheManager, session: Session, letters: str, now: float, **wish: float) -> bytes:
    """Pages of these letters, published and let go."""
    refs = cache.allocate(session, len(letters), None, now)
    retention = Retention(**wish) if wish else NO_WISH  # type: ignore[arg-type]
    done = cache.publish(session, MAIN, page_tokens(letters), refs, None, now, retention)
    cache.free(session, done.refs, now)
    return done.refs


def test_what_is_published_in_place_of_an_expired_first_page_can_be_matched() -> None:
    cache, one = a_pool(4)
    cached(cache, one, "a", 0.0, ttl_s=5.0)
    again = cached(cache, one, "a", 6.0)
    assert cache.match(one, MAIN, page_tokens("ab"), 6.0).refs == again
    check_cache(cache)


def test_a_wish_taken_back_does_not_expire() -> None:
    cache, one = a_pool(4)
    refs = cached(cache, one, "a", 0.0, ttl_s=5.0)
    cache.match(one, MAIN, page_tokens("ab"), 1.0)
    cache.retain(one, refs, NO_WISH)
    cache.free(one, refs, 1.0)
    assert cache.match(one, MAIN, page_tokens("ab"), 9.0).refs == refs


def test_a_request_that_gets_a_fork_waits_no_longer() -> None:
    """It runs from then on, and whoever runs waits for nobody."""
    cache, one = a_pool(16)
    computing, parent, child = (cache.begin(one, 1) for _ in range(3))
    prompt = page_tokens("abc")
    cache.acquire(one, MAIN, prompt, 3, computing, 0.0, announce=True)
    handle, _ = cache.sequences.open(one, MAIN, page_tokens("xy"), parent, 0, 0.0)
    assert cache.wait(one, child, MAIN, prompt, 1.0, 0.0) is not None
    cache.sequences.fork(one, handle, [parent, child], 0.0)
    check_cache(cache)


def test_a_refused_acquire_leaves_a_waiting_request_waiting() -> None:
    cache, one = a_pool(16, CacheOptions(limits=Limits(max_pages_a_session=4)))
    two = cache.open_session(2, "two", 0.0)
    computing, waiting = cache.begin(one, 1), cache.begin(two, 1)
    prompt = page_tokens("abc")
    cache.acquire(one, MAIN, prompt, 3, computing, 0.0, announce=True)
    assert cache.wait(two, waiting, MAIN, prompt, 1.0, 0.0) is not None
    with pytest.raises(OverLimit):
        cache.acquire(two, MAIN, page_tokens("xyzuvw"), 6, waiting, 0.0, own_rate=1.0)
    assert [w for a in cache.announcements for w in a.waiters] == [waiting]


def test_a_sequence_whose_pages_were_freed_behind_its_back_can_be_closed() -> None:
    """With another one, of which nothing is wrong; and no page leaks."""
    cache, one = a_pool(16)
    handles = array("q")
    for letters in ("abc", "xy"):
        handle, _ = cache.sequences.open(one, MAIN, page_tokens(letters), None, 1, 0.0)
        handles.append(handle)
    cache.free(one, one.sequences[handles[0]].refs[1:2].tobytes(), 0.0)
    cache.sequences.close(one, handles, 1.0)
    assert one.sequences == {} and one.num_held_pages == 0
    check_cache(cache)


def test_a_partial_page_counts_against_the_pages_of_a_session() -> None:
    cache, one = a_pool(16, CacheOptions(limits=Limits(max_pages_a_session=2)))
    cached(cache, one, "ab", 0.0)
    cache.acquire(one, MAIN, page_tokens("ab")[:-8], 2, None, 1.0, min_partial=1)
    assert one.num_held_pages <= 2


def test_min_partial_is_checked_also_where_nothing_is_missing() -> None:
    cache, one = a_pool(16)
    cached(cache, one, "ab", 0.0)
    with pytest.raises(BadRequest):
        cache.acquire(one, MAIN, page_tokens("ab"), 1, None, 1.0, min_partial=99)


def test_pages_leased_ahead_are_counted_as_allocated() -> None:
    cache, one = a_pool(16)
    handle, found = cache.sequences.open(one, MAIN, page_tokens("a"), None, 2, 0.0)
    done = cache.sequences.extend(
        one,
        array("q", [handle]),
        array("i", [PAGE_SIZE]),
        array("i", [PAGE_SIZE]),
        page_tokens("b"),
        1.0,
    )
    assert cache.counters.allocated_pages == len(unpacked(found.refs)) + len(done.refs) == 4


def test_a_full_page_that_is_handed_over_is_no_tail() -> None:
    cache, one = a_pool(16)
    two = cache.open_session(2, "two", 0.0)
    cached(cache, one, "a", 0.0)
    mine = cache.allocate(one, 1, None, 0.0)
    cache.publish(one, MAIN, page_tokens("a"), mine, None, 0.0)
    cache.handover.hand_over(one, mine, b"t", 10.0, 0.0)
    assert cache.handover.take_over(two, b"t", 1.0) == (mine, 0)


def test_what_is_cut_off_after_a_flush_is_told_as_removed() -> None:
    """One page of two that were flushed while held is let go: neither can be matched."""
    cache, one = a_pool(4)
    told = cache.tree.observer = Told()
    refs = cache.allocate(one, 2, None, 0.0)
    cache.publish(one, MAIN, page_tokens("ab"), refs, None, 0.0)
    cache.flush(list(cache.tree.roots.values()))
    cache.free(one, refs[8:], 1.0)
    while cache.sweep(1.0):
        pass
    assert one.num_held_pages == 1 and told.pages == {}


def test_tokens_without_a_page_cannot_have_been_computed() -> None:
    """The pool was short: the second row says that what got no page is computed all the same."""
    cache, one = a_pool(1)
    handle, _ = cache.sequences.open(one, MAIN, page_tokens("a"), None, 0, 0.0)
    handles, full = array("q", [handle]), array("i", [PAGE_SIZE])
    assert cache.sequences.extend(one, handles, full, full, page_tokens("b"), 1.0).status == b"\1"
    more = array("i", [PAGE_SIZE + 1])
    assert cache.sequences.extend(one, handles, more, array("i", [0]), b"", 1.0).status == b"\3"
    assert one.sequences[handle].num_computed == PAGE_SIZE


def test_holds_on_flushed_pages_do_not_keep_others_behind_them() -> None:
    """The page c is flushed and nobody's; that its forerunners are shared piece by piece, and so
    cut and joined, does not hide it."""
    cache, one = a_pool(4)
    refs = cache.allocate(one, 3, None, 0.0)
    cache.publish(one, MAIN, page_tokens("abc"), refs, None, 0.0)
    cache.free(one, refs[16:], 0.0)
    cache.flush(list(cache.tree.roots.values()))
    for at in (0, 8):
        cache.share(one, refs[at : at + 8])
    while cache.sweep(1.0):
        pass
    assert len(cache.free_list) == 2


def test_nothing_of_an_old_version_is_published_while_its_namespaces_wait_to_be_flushed() -> None:
    cache, one = a_pool(4)
    refs = cache.allocate(one, 2, None, 0.0)
    cache.publish(one, MAIN, page_tokens("a"), refs[:8], None, 0.0)
    cache.raise_weights_version("m", 1)
    (page,) = unpacked(refs[:8])
    with pytest.raises(StaleVersion):
        cache.publish(one, MAIN, page_tokens("b"), refs[8:], page, 0.0)


def test_timers_are_no_more_than_nodes_however_many_prompts_come_and_go() -> None:
    """Each lives for an hour, and is evicted long before."""
    cache, one = a_pool(4, CacheOptions(ttl_s=3600.0))
    for i in range(50):
        cached(cache, one, chr(ord("A") + i) * 2, float(i))
    assert len(cache.tree._timers) <= sum(1 for _ in cache.tree.nodes()) <= 4
