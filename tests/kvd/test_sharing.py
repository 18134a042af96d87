"""Forks, copies on write, sealed tails and pages that go from one session to another."""

from __future__ import annotations

from kvd.options import CacheOptions, Limits
from kvd_shared.namespace import Namespace
from tests.kvd.paired_cache import PairedCache
from tests.kvd.tokens import PAGE_SIZE, page_tokens

M = Namespace(model="m")


def held(pair: PairedCache, session: int) -> int:
    return pair.sessions[session].num_held_pages


# --- forks


def test_a_fork_shares_full_pages_and_copies_the_one_that_is_not() -> None:
    pair = PairedCache(16)
    pages = pair.allocate(1, 3, None)[1]
    pair.publish(1, M, page_tokens("a"), pages[:1], None)
    answer, new = pair.fork(1, pages, 2 * PAGE_SIZE + 1, 2, None)
    assert answer == "ok" and len(new) == 2
    for twin in (pages, [*pages[:2], new[0]], [*pages[:2], new[1]]):
        assert held(pair, 1) > 0
        assert pair.free(1, twin) == ("ok", None)
    assert held(pair, 1) == 0
    full = pair.allocate(1, 1, None)[1]
    assert pair.fork(1, full, PAGE_SIZE, 3, None) == ("ok", [])


def test_a_page_is_written_by_who_alone_has_it_and_copied_by_others() -> None:
    pair = PairedCache(16)
    (mine,) = pair.allocate(1, 1, None)[1]
    assert pair.make_writable(1, mine, None) == ("ok", [mine])
    pair.share(1, [mine])
    (copy,) = pair.make_writable(1, mine, None)[1]
    assert copy != mine
    pair.free(1, [mine])
    assert pair.make_writable(1, mine, None) == ("ok", [mine])
    pair.publish(1, M, page_tokens("a"), [mine], None)
    assert pair.make_writable(1, mine, None)[1] != [mine]


def test_leased_pages_are_written_only_when_they_are_in_use() -> None:
    pair = PairedCache(8)
    (page,) = pair.lease(1, 1, None)[1]
    assert pair.publish(1, M, page_tokens("a"), [page], None)[0] == "BAD_REQUEST"
    assert pair.make_writable(1, page, None)[0] == "BAD_REQUEST"
    assert pair.use(1, [page]) == ("ok", None)
    assert pair.use(1, [page])[0] == "BAD_REQUEST"
    assert pair.publish(1, M, page_tokens("a"), [page], None) == ("ok", [page])


# --- handing over


def test_a_sequence_goes_to_another_session_with_its_sealed_tail() -> None:
    pair = PairedCache(16)
    pages = pair.allocate(1, 3, None)[1]
    pair.publish(1, M, page_tokens("ab"), pages[:2], None)
    pair.seal_tail(1, pages[2], 5)
    assert pair.make_writable(1, pages[2], None)[1] != [pages[2]]
    assert pair.hand_over(1, pages, b"t", 5.0)[0] == "ok"
    assert pair.free(1, pages)[0] == "NOT_HELD"
    assert pair.take_over(2, b"t") == ("ok", (pages, 5))
    assert pair.take_over(3, b"t")[0] == "UNKNOWN_HANDLE"
    pair.sweep_all()
    assert held(pair, 2) == 3
    assert pair.publish(2, M, page_tokens("c"), pages[2:], pages[1])[0] == "BAD_REQUEST"
    pair.free(2, pages)
    assert pair.core.num_available == 15  # session 1 has its copy of the tail


def test_who_hands_over_a_page_that_it_holds_twice_keeps_one_hold() -> None:
    pair = PairedCache(8)
    pages = pair.allocate(1, 2, None)[1]
    pair.publish(1, M, page_tokens("a"), pages[:1], None)
    pair.seal_tail(1, pages[1], 3)
    pair.share(1, pages)
    pair.hand_over(1, pages, b"t", 5.0)
    assert pair.free(1, pages) == ("ok", None)
    assert pair.core.num_available == 6
    pair.take_over(2, b"t")
    assert pair.free(2, pages) == ("ok", None)
    assert pair.core.num_available == 8


def test_a_tail_that_two_sessions_hold_outlives_the_one_that_dies() -> None:
    pair = PairedCache(8)
    pages = pair.allocate(1, 1, None)[1]
    pair.seal_tail(1, pages[0], 3)
    pair.share(1, pages)
    pair.hand_over(1, pages, b"t", 5.0)
    pair.take_over(2, b"t")
    assert pair.publish(2, M, page_tokens("a"), pages, None)[0] == "BAD_REQUEST"
    pair.release_session(1)
    pair.sweep_all()
    assert len(pair.core.free_list) == 7
    assert pair.free(2, pages) == ("ok", None)
    assert len(pair.core.free_list) == 8


def test_a_duplicate_that_another_session_holds_as_well_is_not_published() -> None:
    pair = PairedCache(8)
    _, cached = pair.allocate(1, 1, None)
    pair.publish(1, M, page_tokens("a"), cached, None)
    _, mine = pair.allocate(2, 1, None)
    pair.publish(2, M, page_tokens("a"), mine, None)
    pair.share(2, mine)
    pair.hand_over(2, mine, b"t", 5.0)
    pair.take_over(3, b"t")
    pair.flush(M)
    assert pair.publish(2, M, page_tokens("a"), mine, None)[0] == "BAD_REQUEST"
    pair.free(3, mine)
    assert pair.publish(2, M, page_tokens("a"), mine, None) == ("ok", mine)


def test_what_nobody_takes_over_in_time_is_freed() -> None:
    pair = PairedCache(8)
    pages = pair.allocate(1, 1, None)[1]
    pair.seal_tail(1, pages[0], 3)
    pair.hand_over(1, pages, b"t", 5.0)
    pair.now += 5.0
    assert pair.take_over(2, b"t")[0] == "UNKNOWN_HANDLE"
    pair.tick()
    pair.sweep_all()
    assert len(pair.core.free_list) == 8
    assert len(pair.core.handover) == 0


def test_a_session_does_not_take_over_more_than_it_may_hold() -> None:
    options = CacheOptions(limits=Limits(max_pages_a_session=3))
    pair = PairedCache(8, options=options)
    pages = pair.allocate(1, 2, None)[1]
    pair.publish(1, M, page_tokens("ab"), pages, None)
    pair.hand_over(1, pages, b"t", 5.0)
    pair.allocate(2, 2, None)
    assert pair.take_over(2, b"t")[0] == "OVER_LIMIT"
    assert pair.take_over(3, b"t")[0] == "ok"


# --- partial pages


def test_the_page_that_continues_a_prompt_best_is_held_to_be_copied() -> None:
    pair = PairedCache(16)
    for letters in ("ab", "ac"):
        pages = pair.allocate(1, 2, None)[1]
        done = pair.publish(1, M, page_tokens(letters), pages, None)[1]
        pair.free(1, sorted({*pages, *done}))
    half = page_tokens("ab")[: -3 * 4]
    answer, (_, refs, stop, (partial, tokens), _, _) = pair.match(2, M, half, 1)
    assert (answer, len(refs), stop, tokens) == ("ok", 1, "limit", PAGE_SIZE - 4)
    assert partial == pair.model.tree.pages[refs[0]].children[page_tokens("b")].ref
    assert pair.match(3, M, half, PAGE_SIZE - 3)[1][3] == (None, 0)
    pair.free(2, [partial, *refs])
    assert held(pair, 2) == 0


def test_a_partial_page_is_left_where_its_place_is_needed_more() -> None:
    """Two pages are cached, one is free. Of the prompt's three, one is cached, and two are new: the
    second one evicts the page that would have been copied."""
    pair = PairedCache(3)
    pages = pair.allocate(1, 2, None)[1]
    pair.publish(1, M, page_tokens("ab"), pages, None)
    pair.free(1, pages)
    answer, found = pair.acquire(2, M, page_tokens("ab")[:-4] + page_tokens("x"), 3, None, 1)
    assert answer == "ok" and found[3] == (None, 0) and found[1][0] == pages[0]


# --- sequences by handle


def test_a_sequence_grows_publishes_and_swaps_by_its_handle() -> None:
    pair = PairedCache(16)
    first = pair.open_sequence(1, M, page_tokens("ab"), None, 1)[1]
    handle, refs = first[0], first[1]
    assert len(refs) == 3 and len(pair.sessions[1].leased) == 1
    other = pair.open_sequence(2, M, page_tokens("ab"), None, 0)[1]
    assert pair.extend(2, [(other[0], 2 * PAGE_SIZE, b"")])[1] == [(0, [], [])]
    rows = pair.extend(1, [(handle, 2 * PAGE_SIZE, page_tokens("c"))])[1]
    ((status, new, swaps),) = rows
    assert status == 0 and len(new) == 1 and swaps == [(0, other[1][0]), (1, other[1][1])]
    assert held(pair, 1) == 6  # its worker may still be reading the two duplicates
    pair.extend(1, [(handle, 2 * PAGE_SIZE, b"")])
    assert held(pair, 1) == 4
    handles, copies, source = pair.fork_sequence(1, handle, [None])[1]
    assert len(copies) == 2 and source == []
    pair.extend(1, [(handle, 2 * PAGE_SIZE + 3, b"")])
    _, copies, source = pair.fork_sequence(1, handle, [None])[1]
    assert source == [refs[2]] and len(copies) == 2
    pair.close(1, [handle, *handles])
    assert handle not in pair.sessions[1].sequences


def test_all_requests_that_get_a_fork_run() -> None:
    """With pages of their own or, of a sequence of full pages, without."""
    pair = PairedCache(16)
    handle = pair.open_sequence(1, M, page_tokens("a"), None, 0)[1][0]
    for computed in (0, PAGE_SIZE):
        pair.extend(1, [(handle, computed, b"")])
        first = pair.begin(1, 3)[1]
        numbers = [first, first + 1, first + 2]
        assert pair.fork_sequence(1, handle, numbers)[0] == "ok"
        running = [r.number for r in pair.core.queue._requests.values() if r.running]
        assert running[-3:] == numbers


def test_a_sequence_is_closed_with_the_duplicates_that_it_has_just_swapped() -> None:
    pair = PairedCache(16)
    first, second = (pair.open_sequence(s, M, page_tokens("a"), None, 0)[1] for s in (1, 2))
    pair.extend(1, [(first[0], PAGE_SIZE, b"")])
    ((status, _, swaps),) = pair.extend(2, [(second[0], PAGE_SIZE, b"")])[1]
    assert (status, swaps, held(pair, 2)) == (0, [(0, first[1][0])], 2)
    pair.close(2, [second[0]])
    assert held(pair, 2) == 0


def test_a_sequence_of_an_old_version_computes_on() -> None:
    pair = PairedCache(16)
    handle = pair.open_sequence(1, M, page_tokens("a"), None, 0)[1][0]
    pair.raise_weights_version("m", 1)
    ((status, new, _),) = pair.extend(1, [(handle, PAGE_SIZE, page_tokens("b"))])[1]
    assert status == 4 and len(new) == 1


def test_a_flushed_sequence_computes_on_and_publishes_no_more() -> None:
    pair = PairedCache(16)
    handle = pair.open_sequence(1, M, page_tokens("a"), None, 0)[1][0]
    pair.extend(1, [(handle, PAGE_SIZE, page_tokens("b"))])
    pair.flush(M)
    ((status, _, _),) = pair.extend(1, [(handle, 2 * PAGE_SIZE, page_tokens("c"))])[1]
    assert status == 5
    assert pair.extend(1, [(handle, 3 * PAGE_SIZE, b"")])[1] == [(0, [], [])]
    pair.close(1, [handle])
    pair.sweep_all()
    assert len(pair.core.free_list) == 16
