"""The cache core's promises in stories; each operation goes to the reference model as well."""

from __future__ import annotations

import pytest

from kvd.free_list import FEW, FreeList
from kvd_shared.namespace import Namespace
from kvd_shared.refs import GENERATION, TOKEN_BYTES
from tests.kvd.paired_cache import PairedCache
from tests.kvd.tokens import packed, page_tokens

M, N = Namespace(model="m"), Namespace(model="n")


def matched(pair: PairedCache, session: int, namespace: Namespace, tokens: bytes) -> list[int]:
    """The pages of the longest cached prefix."""
    answer, found = pair.match(session, namespace, tokens)
    assert answer == "ok"
    refs: list[int] = found[1]
    return refs


# --- stories


def test_the_last_token_of_a_prompt_is_never_matched() -> None:
    """Of a cached prompt of three whole pages, two match: its last token's logits are wanted."""
    pair = PairedCache(8)
    _, pages = pair.allocate(1, 3, None)
    pair.publish(1, M, page_tokens("abc"), pages, None)
    assert matched(pair, 2, M, page_tokens("abc")) == pages[:2]
    assert matched(pair, 2, M, page_tokens("abc") + b"\0" * TOKEN_BYTES) == pages
    assert matched(pair, 2, M, page_tokens("abc")[:-TOKEN_BYTES]) == pages[:2]
    assert matched(pair, 2, M, page_tokens("a")[: 2 * TOKEN_BYTES]) == []


def test_who_publishes_the_beginning_of_a_cached_prompt_gets_the_cached_pages() -> None:
    pair = PairedCache(8)
    _, cached = pair.allocate(1, 4, None)
    pair.publish(1, M, page_tokens("abcd"), cached, None)
    _, mine = pair.allocate(2, 3, None)
    assert pair.publish(2, M, page_tokens("abx"), mine, None) == ("ok", [*cached[:2], mine[2]])
    assert pair.free(2, mine[:2]) == ("ok", None)
    assert pair.free(2, mine[:2])[0] == "NOT_HELD"
    assert matched(pair, 3, M, page_tokens("abx.")) == [*cached[:2], mine[2]]


def test_two_forks_publish_what_they_share_and_each_keeps_its_hold() -> None:
    pair = PairedCache(8)
    _, pages = pair.allocate(1, 2, None)
    pair.share(1, pages)
    pair.publish(1, M, page_tokens("ab"), pages, None)
    pair.publish(1, M, page_tokens("ab"), pages, None)
    pair.free(1, pages)
    assert pair.core.num_available == 6
    pair.free(1, pages)
    assert pair.core.num_available == 8
    assert pair.free(1, pages)[0] == "NOT_HELD"


def test_forks_that_were_too_late_swap_one_by_one() -> None:
    """The shared page is a duplicate. Each fork's publish gives it a hold on the cached page, and
    the duplicate is free when both have let go of it."""
    pair = PairedCache(4)
    _, cached = pair.allocate(1, 1, None)
    pair.publish(1, M, page_tokens("a"), cached, None)
    _, shared = pair.allocate(2, 1, None)
    pair.share(2, shared)
    for available in (2, 3):
        assert pair.publish(2, M, page_tokens("a"), shared, None) == ("ok", cached)
        pair.free(2, shared)
        assert pair.core.num_available == available
    assert pair.model.sessions[2].cached[cached[0]] == 2


def test_publishing_goes_on_only_behind_a_page_that_one_holds() -> None:
    pair = PairedCache(8)
    _, cached = pair.allocate(1, 1, None)
    pair.publish(1, M, page_tokens("a"), cached, None)
    _, mine = pair.allocate(2, 1, None)
    assert pair.publish(2, M, page_tokens("b"), mine, cached[0])[0] == "NOT_HELD"
    assert pair.publish(2, M, page_tokens("b"), mine, mine[0])[0] == "BAD_REQUEST"
    assert pair.publish(2, M, page_tokens("a"), cached, None)[0] == "NOT_HELD"
    pair.match(2, M, page_tokens("a."))
    assert pair.publish(2, N, page_tokens("b"), mine, cached[0])[0] == "BAD_REQUEST"
    assert pair.publish(2, M, page_tokens("b"), mine, cached[0]) == ("ok", mine)


@pytest.mark.parametrize(("pages", "tokens"), [(0, ""), (1, ""), (1, "ab"), (2, "a")])
def test_a_publish_of_no_pages_or_of_other_pages_than_tokens_is_refused(
    pages: int, tokens: str
) -> None:
    pair = PairedCache(8)
    mine = pair.allocate(1, 2, None)[1][:pages]
    assert pair.publish(1, M, page_tokens(tokens), mine, None)[0] == "BAD_REQUEST"


def test_refused_pages_leave_everything_where_it_was() -> None:
    """Two of four wanted pages could be had; none is taken, and the cached ones stay cached."""
    pair = PairedCache(6)
    _, pages = pair.allocate(1, 2, None)
    pair.publish(1, M, page_tokens("ab"), pages, None)
    pair.free(1, pages)
    pair.allocate(2, 4, None)
    assert pair.allocate(3, 4, None) == ("NO_PAGES", 2)
    assert pair.acquire(3, M, page_tokens("ab."), 3, None) == ("NO_PAGES", 1)
    assert matched(pair, 3, M, page_tokens("ab.")) == pages


def test_a_dead_worker_leaves_what_it_published_and_nothing_else() -> None:
    pair = PairedCache(8)
    _, pages = pair.allocate(1, 3, None)
    pair.publish(1, M, page_tokens("ab"), pages[:2], None)
    pair.share(1, pages)
    pair.match(2, M, page_tokens("a."))
    pair.begin(1, 2)
    pair.end_session(1)
    assert pair.allocate(1, 1, None)[0] == "SESSION_ENDED"
    assert pair.core.num_available == 5  # it may still be reading and writing its pages
    pair.release_session(1)
    pair.sweep_all()
    assert pair.core.num_available == 7
    assert matched(pair, 2, M, page_tokens("ab.")) == pages[:2]


def test_free_pages_go_out_in_order_and_those_freed_last_first() -> None:
    pair = PairedCache(6)
    assert pair.allocate(1, 3, None) == ("ok", [0, 1, 2])
    pair.free(1, [0])
    pair.free(1, [2])
    assert pair.allocate(1, 3, None) == ("ok", [2 + GENERATION, 0 + GENERATION, 3])


@pytest.mark.parametrize("count", [1, FEW + 1])  # a few pages go another way than many
def test_a_page_that_becomes_free_has_another_generation(count: int) -> None:
    pages = FreeList(count)
    refs = pages.take(count)
    pages.put(refs.tobytes())
    assert not any(map(pages.is_current, refs))
    assert sorted(pages.take(count)) == [(1 << 32) + page for page in range(count)]


@pytest.mark.parametrize("count", [1, FEW + 1])  # a few pages go another way than many
def test_a_generation_that_has_run_out_starts_anew(count: int) -> None:
    pages = FreeList(count)
    pages.take(count)
    pages.put(packed([(0x7FFF_FFFF << 32) + page for page in reversed(range(count))]))
    pages.check()
    assert pages.take(count).tolist() == list(range(count))


def test_one_that_does_not_yield_in_time_is_passed_over() -> None:
    pair = PairedCache(6)
    for session in (1, 2, 3):
        number = pair.begin(session, 1)[1]
        pair.allocate(session, 2, number)
    assert pair.allocate(1, 1, 1)[0] == "NO_PAGES"
    asked = [r.number for r in pair.model.queue.requests if r.asked]
    for pair.now in (1.0, 4.0):
        pair.tick()
    pair.allocate(1, 1, 1)
    assert [r.number for r in pair.model.queue.requests if r.asked] == [2, *asked] == [2, 3]


def test_a_duplicate_is_published_after_all_when_the_other_page_is_gone() -> None:
    """It is sealed already, and enters the tree with all of its holds."""
    pair = PairedCache(4)
    _, cached = pair.allocate(1, 1, None)
    pair.publish(1, M, page_tokens("a"), cached, None)
    pair.free(1, cached)
    _, mine = pair.allocate(2, 1, None)
    pair.share(2, mine)
    assert pair.publish(2, M, page_tokens("a"), mine, None) == ("ok", cached)
    pair.flush(M)
    assert pair.publish(2, M, page_tokens("a"), mine, None) == ("ok", mine)
    assert matched(pair, 3, M, page_tokens("ab")) == mine
    pair.free(2, mine)
    pair.free(2, mine)
    assert pair.free(2, mine)[0] == "NOT_HELD"
