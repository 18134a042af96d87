"""After a restart: who resumes gets what it held, who does not is fenced before it loses it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.metadata import ENDED, FENCED, LIVE, Metadata
from kvd.metadata.failpoints import FAILPOINTS
from kvd.recovery import Recovery, recover
from kvd_shared.errors import BadRequest, Detached, SessionEnded
from kvd_shared.namespace import Namespace
from kvd_shared.refs import GENERATION
from tests.kvd.metadata.test_tables import copy
from tests.kvd.metadata.worlds import process, small_metadata
from tests.kvd.tokens import packed, page_tokens, unpacked

M = Namespace(model="m")


def counts(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<i4").tobytes()


class Story:
    """Sessions 1 and 2: "abc" is cached, 1 holds "ab" of it twice and writes a page; 2 holds "abc"
    and has sealed a tail. Then the daemon dies."""

    def __init__(self) -> None:
        self.old = CacheManager(12, 8, meta=small_metadata(12, 8))
        one = self.old.open_session(1, "one", 0.0, process(1))
        two = self.old.open_session(2, "two", 0.0, process(2))
        refs = self.old.allocate(one, 3, None, 0.0)
        self.old.publish(one, M, page_tokens("abc"), refs, None, 0.0)
        self.abc = unpacked(refs)
        self.old.match(two, M, page_tokens("abc."), 0.0)
        self.old.free(one, packed(self.abc[2:]), 0.0)
        self.old.share(one, packed(self.abc[:2]))
        self.mine = unpacked(self.old.allocate(one, 2, None, 0.0))
        self.tail = unpacked(self.old.allocate(two, 1, None, 0.0))
        self.old.seal_tail(two, self.tail[0], 5)
        self.restart()

    def restart(self) -> None:
        self.new = CacheManager(12, 8, meta=copy(self.old.meta))
        self.recovery: Recovery = recover(self.new, 10.0, 5.0)
        check_cache(self.new)

    def sweep(self) -> None:
        while self.new.sweep(11.0):
            pass
        check_cache(self.new)

    def state(self, session: int) -> int:
        return copy(self.new.meta).sessions.load()[session].state


def test_all_resume_and_everything_is_as_it_was() -> None:
    story = Story()
    new, recovery = story.new, story.recovery
    assert new.num_available == 6  # nothing that somebody may use
    one = recovery.resume(1)
    held = packed([*story.abc[:2], *story.mine])
    assert recovery.declare(one, held, counts(2, 2, 1, 3), False, 10.0) == b""
    assert recovery.is_declaring(one)
    assert recovery.declare(one, b"", b"", True, 10.0) == b""
    two = recovery.resume(2)
    held = packed([*story.abc, *story.tail])
    assert recovery.declare(two, held, counts(1, 1, 1, 1), True, 10.0) == b""
    assert recovery.over and not recovery.ended
    story.sweep()
    assert sorted(new.sessions) == [1, 2]
    assert new.sealed == {story.tail[0]: (5, 1)}
    assert one.writing == {story.mine[0]: 1, story.mine[1]: 3}
    new.free(one, packed(story.abc[:2]), 11.0)
    new.free(one, packed(story.abc[:2]), 11.0)
    new.free(two, packed(story.abc + story.tail), 11.0)
    check_cache(new)
    assert new.num_available == 10


def test_who_does_not_resume_is_fenced_before_anything_of_its_goes() -> None:
    """Its own pages stay quarantined until it is proven dead."""
    story = Story()
    new, recovery = story.new, story.recovery
    recovery.declare(recovery.resume(1), packed(story.mine), counts(1, 1), True, 10.0)
    assert recovery.tick(14.9) == [] and not recovery.over
    stood: list[tuple[int, int]] = []
    FAILPOINTS.arm("*", action=lambda _: stood.append((story.state(2), new.num_available)))
    assert recovery.tick(15.0) == [2]
    story.sweep()
    FAILPOINTS.disarm()
    assert all(free == 6 for state, free in stood if state == LIVE)
    assert (story.state(1), story.state(2)) == (LIVE, FENCED)
    assert new.num_available == 12 - len(story.mine)
    with pytest.raises(SessionEnded):
        recovery.resume(2)
    recovery.dead(new.sessions[2], 16.0)
    story.sweep()
    assert list(copy(new.meta).sessions.load()) == [1]


def test_who_resumes_and_never_says_done_is_fenced_too() -> None:
    story = Story()
    one = story.recovery.resume(1)
    story.recovery.declare(one, packed(story.abc[:1]), counts(1), False, 10.0)
    story.recovery.dead(story.new.sessions[2], 10.0)
    assert not story.recovery.over
    assert story.recovery.end_grace(12.0) == [1]
    assert story.recovery.over and one.ended and story.state(1) == FENCED
    story.sweep()
    assert one.nodes and set(one.writing) == set(story.mine)  # until it is dead
    story.recovery.dead(one, 13.0)
    story.sweep()
    assert story.new.num_available == 12


def test_all_dead_ends_it_at_once() -> None:
    story = Story()
    for number in (1, 2):
        story.recovery.dead(story.new.sessions[number], 10.0)
    assert story.recovery.over
    story.sweep()
    assert story.new.num_available == 12 and not story.new.sessions
    assert story.new.tree.walk(M, page_tokens("abc"), 3, 11.0).num_pages == 3


def test_what_had_ended_before_is_not_waited_for_and_not_resumed() -> None:
    story = Story()
    story.old.end_session(story.old.sessions[1])
    story.restart()
    assert story.state(1) == ENDED and set(story.recovery.ended) == {1}
    with pytest.raises(SessionEnded):
        story.recovery.resume(1)
    story.recovery.dead(story.new.sessions[2], 10.0)
    assert story.recovery.over
    story.sweep()
    assert set(story.new.sessions[1].writing) == set(story.mine)


def test_only_what_it_can_have_is_accepted_and_the_rest_is_named() -> None:
    story = Story()
    one = story.recovery.resume(1)
    theirs, stale = story.mine[0], story.abc[0] + GENERATION
    wrong = [stale, 11, -1, 1 << 40, GENERATION + 11]
    asked = [story.abc[0], stale, 11, theirs, -1, 1 << 40, GENERATION + 11, *story.tail]
    refused = story.recovery.declare(one, packed(asked), counts(*[1] * 8), False, 10.0)
    assert unpacked(refused) == wrong
    two = story.recovery.resume(2)
    refused = story.recovery.declare(two, packed([theirs]), counts(1), True, 10.0)
    assert unpacked(refused) == [theirs]
    story.recovery.declare(one, b"", b"", True, 10.0)
    assert one.writing == {theirs: 1}  # the other one was not declared: it is free
    story.sweep()


@pytest.mark.parametrize(
    ("refs", "times"),
    [([0, 0], [1, 1]), ([0], [0]), ([0], [-1]), ([0], [1 << 21]), ([0], [1, 1]), ([0, 1], [1])],
)
def test_a_senseless_declaration_changes_nothing(refs: list[int], times: list[int]) -> None:
    story = Story()
    one = story.recovery.resume(1)
    with pytest.raises(BadRequest):
        story.recovery.declare(one, packed(refs), counts(*times), True, 10.0)
    assert story.recovery.is_declaring(one) and not one.nodes
    story.recovery.declare(one, b"", b"", True, 10.0)
    with pytest.raises(BadRequest):
        story.recovery.declare(one, b"", b"", True, 10.0)


def test_flushed_pages_that_are_held_stay_until_let_go_and_are_never_published_again() -> None:
    story = Story()
    story.old.flush(list(story.old.tree.roots.values()))
    story.restart()
    new = story.new
    assert story.recovery.report.matchable == 0 and story.recovery.report.dropped == {
        "root_gone": 3
    }
    one = story.recovery.resume(1)
    held = packed([*story.abc[:2], *story.mine])
    assert not story.recovery.declare(one, held, counts(1, 1, 1, 1), True, 10.0)
    story.recovery.dead(new.sessions[2], 10.0)
    story.sweep()
    with pytest.raises(BadRequest):
        new.publish(one, M, page_tokens("ab"), packed(story.abc[:2]), None, 11.0)
    with pytest.raises(Detached):
        new.publish(one, M, page_tokens("x"), packed(story.mine[:1]), story.abc[1], 11.0)
    assert new.tree.walk(M, page_tokens("ab"), 2, 11.0).num_pages == 0
    new.free(one, held, 11.0)
    check_cache(new)
    assert new.num_available == 12


def test_a_crash_during_recovery_is_recovered_from() -> None:
    """At each of its stores, and the second recovery brings back the same."""
    story = Story()
    story.old.end_session(story.old.sessions[2])
    story.old.raise_weights_version("other", 1)
    pages = story.old.allocate(story.old.sessions[1], 1, None, 0.0)
    gone = Namespace(model="gone")
    story.old.publish(story.old.sessions[1], gone, page_tokens("z"), pages, None, 0.0)
    story.old.raise_weights_version("gone", 1)
    want = recover(CacheManager(12, 8, meta=copy(story.old.meta)), 10.0).report
    meta = copy(story.old.meta)
    stood: list[Metadata] = []
    FAILPOINTS.arm("*", action=lambda _: stood.append(copy(meta)))
    recover(CacheManager(12, 8, meta=meta), 10.0)
    FAILPOINTS.disarm()
    assert len(stood) >= 5
    for one in [*stood, copy(meta)]:
        cache = CacheManager(12, 8, meta=one)
        report = recover(cache, 10.0).report
        check_cache(cache)
        assert (report.matchable, report.quarantined) == (want.matchable, want.quarantined)
        assert (report.private, report.free) == (want.private, want.free)


def test_two_pages_that_claim_the_same_place() -> None:
    """They cannot both be right: one of them, and what is behind the other, is gone."""
    story = Story()
    meta = copy(story.old.meta)
    spare = 11
    row = meta.records.rows[story.abc[1] & 0xFFFF].copy()
    row[6] = spare
    row[0] = meta.records._checksum.one(row[1:].tobytes())
    meta.records.rows[spare] = row
    meta.pages.set_owner(packed([spare]), 0xFFFF_FFFF)
    cache = CacheManager(12, 8, meta=meta)
    report = recover(cache, 10.0).report
    check_cache(cache)
    assert report.matchable in (2, 3) and report.dropped["claimed_twice"] in (1, 2)
    assert report.matchable + report.dropped["claimed_twice"] == 4


def test_records_in_a_ring_come_to_no_start() -> None:
    story = Story()
    meta = copy(story.old.meta)
    page = story.abc[0]
    meta.records.rows[page][7] = story.abc[2]
    meta.records.rows[page][0] = meta.records._checksum.one(meta.records.rows[page][1:].tobytes())
    cache = CacheManager(12, 8, meta=meta)
    report = recover(cache, 10.0).report
    check_cache(cache)
    assert report.matchable == 0 and report.dropped == {"orphaned": 3}


@pytest.mark.parametrize("what", ["generation", "root", "nowhere"])
def test_what_stands_behind_another_use_of_a_page_is_dropped(what: str) -> None:
    """Rows that are whole, and speak of a page that is not the one they were published behind."""
    story = Story()
    one = story.old.sessions[1]
    other = story.old.allocate(one, 1, None, 0.0)
    story.old.publish(one, Namespace(model="n"), page_tokens("z"), other, None, 0.0)
    meta = copy(story.old.meta)
    parent = {
        "generation": story.abc[0] + GENERATION,
        "root": unpacked(other)[0],
        "nowhere": 1 << 31,
    }[what]
    row = meta.records.rows[story.abc[1]]
    row[7] = parent
    row[0] = meta.records._checksum.one(row[1:].tobytes())
    cache = CacheManager(12, 8, meta=meta)
    report = recover(cache, 10.0).report
    check_cache(cache)
    assert report.matchable == 2 and report.dropped == {"orphaned": 2}


def test_the_order_of_publication_is_the_order_of_eviction() -> None:
    cache = CacheManager(16, 8, meta=small_metadata(16, 8))
    one = cache.open_session(1, "one", 0.0, process(1))
    letters = random.Random(1).sample("abcdefgh", 8)
    for at, letter in enumerate(letters):
        refs = cache.allocate(one, 1, None, float(at))
        cache.publish(one, M, page_tokens(letter), refs, None, float(at))
        cache.free(one, refs, float(at))
    again = CacheManager(16, 8, meta=copy(cache.meta))
    found = recover(again, 20.0)
    found.dead(again.sessions[1], 20.0)
    while again.sweep(20.0):
        pass
    for at, letter in enumerate(letters):
        assert again.tree.walk(M, page_tokens(letter), 1, 20.0).num_pages == 1
        again.evict(1, 20.0 + at)
        assert again.tree.walk(M, page_tokens(letter), 1, 20.0).num_pages == 0
