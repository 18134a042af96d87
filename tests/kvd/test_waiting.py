"""No prefix is computed twice at the same time: stories of announcing and waiting."""

from __future__ import annotations

import pytest

import kvd.announcements
from kvd.age_queue import Request
from kvd_shared.errors import OverLimit
from kvd_shared.namespace import Namespace
from tests.kvd.paired_cache import PairedCache
from tests.kvd.tokens import PAGE_SIZE, page_tokens

M = Namespace(model="m")
PROMPT = page_tokens("abcd")
Notice = tuple[str, int, int]


class Story:
    """Session 1 computes the prompt under number 1; session 2 has number 2 and wants it too."""

    def __init__(self) -> None:
        self.pair = PairedCache(16)
        self.heard: list[Notice] = []
        tell = self.pair.core.announcements._tell

        def hear(kind: str, request: Request, tokens: int) -> None:
            self.heard.append((kind, request.number, tokens))
            tell(kind, request, tokens)

        self.pair.core.announcements._tell = hear
        self.pair.begin(1, 1)
        self.pair.begin(2, 1)
        answer, found = self.pair.acquire(1, M, PROMPT, 4, 1, announce=True)
        assert answer == "ok"
        self.pages = found[1]
        self.published = 0

    def publish(self, count: int, after_s: float = 1.0) -> None:
        self.pair.now += after_s
        start, stop = self.published, self.published + count
        after = self.pages[start - 1] if start else None
        tokens = page_tokens("abcd"[start:stop])
        assert self.pair.publish(1, M, tokens, self.pages[start:stop], after)[0] == "ok"
        self.published = stop

    def wait(self, tokens: bytes = PROMPT, rate: float = 0.01) -> tuple[int, float | None] | None:
        answer, found = self.pair.wait(2, 2, M, tokens, rate)
        assert answer == "ok"
        pending: tuple[int, float | None] | None = found
        return pending

    def news(self) -> list[Notice]:
        heard, self.heard = self.heard, []
        return heard


def test_who_waits_is_told_page_by_page_and_at_the_end_that_all_is_there() -> None:
    """The last page of the prompt is not waited for: its last token is computed anyway."""
    story = Story()
    assert story.wait() == (3 * PAGE_SIZE, None)  # its pace is not known yet
    story.publish(1)
    assert story.news() == [("progress", 2, PAGE_SIZE)]
    assert story.wait() == (3 * PAGE_SIZE, 2.0)  # a page a second
    story.publish(2)
    assert story.news() == [("ready", 2, 3 * PAGE_SIZE)]
    story.publish(1)
    assert story.news() == []
    assert len(story.pair.core.announcements) == 0


def test_nobody_waits_who_would_be_quicker_alone() -> None:
    story = Story()
    story.publish(1, after_s=8.0)  # a page in eight seconds, so sixteen for the other two
    assert story.wait(rate=PAGE_SIZE / 4) is None
    assert story.wait(rate=PAGE_SIZE / 12) == (3 * PAGE_SIZE, 16.0)


def test_the_pace_is_that_of_computing_not_of_what_was_cached_before() -> None:
    story = Story()
    story.publish(4)
    story.pair.yielded(1, 1)
    longer = page_tokens("abcdefgh")
    refs = story.pair.acquire(1, M, longer, 8, 1, announce=True)[1][1]
    story.pair.now += 2.0
    assert story.pair.publish(1, M, page_tokens("e"), refs[4:5], refs[3])[0] == "ok"
    assert story.wait(longer) == (7 * PAGE_SIZE, 4.0)  # a page in two seconds


def test_only_what_both_prompts_have_is_waited_for() -> None:
    story = Story()
    assert story.wait(page_tokens("abxy")) == (2 * PAGE_SIZE, None)
    story.publish(3)
    assert story.news() == [("ready", 2, 2 * PAGE_SIZE)]
    assert story.wait(page_tokens("xbcd")) is None
    assert story.pair.wait(2, 2, Namespace(model="n"), PROMPT, 0.01) == ("ok", None)


@pytest.mark.parametrize("end", ["end", "yielded", "no pages", "session", "hang"])
def test_waiting_ends_when_the_computer_does_no_more(end: str) -> None:
    story = Story()
    pair = story.pair
    story.publish(1)
    story.wait()
    if end == "end":
        pair.end(1, 1)
    elif end == "yielded":
        pair.yielded(1, 1)
    elif end == "no pages":
        assert pair.allocate(1, 16, 1)[0] == "NO_PAGES"
    elif end == "session":
        pair.end_session(1)
    else:
        pair.now += 60.0
        pair.tick()
    assert story.news() == [("ended", 2, PAGE_SIZE)]
    assert story.wait() is None


def test_who_gets_pages_waits_no_longer() -> None:
    story = Story()
    story.wait()
    assert story.pair.acquire(2, M, PROMPT, 4, 2)[0] == "ok"
    story.publish(4)
    assert story.news() == []


def test_whoever_runs_cannot_wait_and_whoever_waits_cannot_announce() -> None:
    """So whoever is waited for waits for nobody, and no cycle can form."""
    story = Story()
    assert story.pair.wait(1, 1, M, PROMPT, 0.01)[0] == "BAD_REQUEST"
    assert story.pair.announce(2, 2, M, PROMPT)[0] == "BAD_REQUEST"


def test_acquire_waits_and_holds_nothing() -> None:
    story = Story()
    answer, found = story.pair.acquire(2, M, PROMPT, 4, 2, rate=0.01)
    assert (answer, found[1], found[2]) == ("ok", [], "pending")
    assert story.pair.sessions[2].num_held_pages == 0
    story.publish(4)
    assert story.news() == [("ready", 2, 3 * PAGE_SIZE)]
    answer, found = story.pair.acquire(2, M, PROMPT, 4, 2, rate=0.01)
    assert (answer, found[1][:3], found[2]) == ("ok", story.pages[:3], "limit")


def test_a_match_says_what_is_on_its_way() -> None:
    story = Story()
    story.publish(1)
    answer, found = story.pair.match(2, M, PROMPT)
    assert (answer, found[1], found[2]) == ("ok", story.pages[:1], "not_cached")
    assert found[4] == (3 * PAGE_SIZE, 2.0)


def test_what_a_fork_or_another_announcement_replaces_is_over() -> None:
    story = Story()
    story.wait()
    assert story.pair.announce(1, 1, M, page_tokens("xyz"))[0] == "ok"
    assert story.news() == [("ended", 2, 0)]


@pytest.mark.parametrize("by", ["flush", "version"])
def test_what_is_flushed_or_too_old_is_waited_for_no_more(by: str) -> None:
    story = Story()
    story.publish(1)
    story.wait()
    if by == "flush":
        story.pair.flush(M)
    else:
        story.pair.raise_weights_version("m", 1)
        assert story.pair.announce(1, 1, M, PROMPT)[0] == "ok"
    assert story.news() == [("ended", 2, PAGE_SIZE)]
    assert len(story.pair.core.announcements) == 0


def test_a_version_that_is_too_old_is_waited_for_no_more_though_nothing_of_it_is_cached() -> None:
    story = Story()
    story.wait()
    story.pair.raise_weights_version("m", 1)
    assert story.news() == [("ended", 2, 0)]


def test_what_was_done_and_is_gone_again_is_not_waited_for() -> None:
    """Its computer goes on behind it and computes it no more."""
    story = Story()
    story.publish(2)
    story.pair.free(1, story.pages[:2])
    story.pair.evict(2)
    assert story.wait(page_tokens("abxy")) is None
    assert story.wait(PROMPT) is not None


def test_who_waits_keeps_no_pages_from_others() -> None:
    """It was refused pages before; since it waits, it wants none."""
    story = Story()
    assert story.pair.acquire(2, M, page_tokens("x"), 16, 2)[0] == "NO_PAGES"
    assert story.pair.allocate(3, 1, None)[0] == "NO_PAGES"
    assert story.wait() is not None
    assert story.pair.allocate(3, 12, None)[0] == "ok"


def test_a_fork_without_a_copy_runs() -> None:
    """Its request waits no longer, and may announce."""
    story = Story()
    story.wait()
    pages = story.pair.allocate(2, 1, None)[1]
    assert story.pair.fork(2, pages, PAGE_SIZE, 1, 2) == ("ok", [])
    assert story.pair.announce(2, 2, M, page_tokens("xy"))[0] == "ok"


def test_only_so_much_can_be_announced_and_a_refusal_leaves_what_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kvd.announcements, "MAX_ANNOUNCED_BYTES", len(PROMPT))
    story = Story()
    cache, (one, two) = story.pair.core, (story.pair.sessions[1], story.pair.sessions[2])
    story.wait()
    with pytest.raises(OverLimit):
        cache.announce(one, 1, M, page_tokens("vwxyz"), 0.0)
    assert story.news() == [] and cache.announcements.num_bytes == len(PROMPT)
    cache.announce(one, 1, M, page_tokens("wxyz"), 0.0)  # in the place of what it announced before
    assert story.news() == [("ended", 2, 0)]
    cache.acquire(two, M, page_tokens("q"), 1, 2, 0.0, announce=True)
    assert [a.request.number for a in cache.announcements] == [1]
    cache.announcements.end(cache.queue.get(one, 1))
    cache.announce(two, 2, M, page_tokens("rs"), 0.0)
    cache.acquire(two, M, page_tokens("abcde"), 5, 2, 0.0, announce=True)
    assert len(cache.announcements) == cache.announcements.num_bytes == 0
