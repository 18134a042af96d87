"""When pages are short, age decides, and everybody finishes."""

from __future__ import annotations

import random

import pytest

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.session import Session
from kvd_shared.errors import NoPages
from kvd_shared.refs import TOKEN_BYTES
from tests.kvd.obedient_workers import MAIN, Host, Sequence
from tests.kvd.tokens import PAGE_SIZE, page_tokens


def a_pool(num_pages: int) -> tuple[CacheManager, Session, Session]:
    cache = CacheManager(num_pages, PAGE_SIZE)
    return cache, cache.open_session(1, "one", 0.0), cache.open_session(2, "two", 0.0)


def asked(cache: CacheManager) -> list[int]:
    numbers = [request.number for kind, request, _ in cache.notices if kind == "yield"]
    cache.notices.clear()
    return numbers


def refused(cache: CacheManager, session: Session, count: int, number: int | None) -> int:
    """How many pages were missing."""
    with pytest.raises(NoPages) as e:
        cache.allocate(session, count, number, 0.0)
    return int(e.value.details["missing"])


# --- stories


def test_two_sequences_that_each_need_most_of_the_pool_both_finish() -> None:
    """Each grows to 60 % of the pool. They meet half-way; the younger makes room, waits without
    a page, and resumes from what it had published."""
    host = Host(20, 2, random.Random(1))
    older, younger = Sequence("a" * 12, 2), Sequence("b" * 12, 2)
    host.workers[0].add(older)
    host.workers[1].add(younger)
    while host.unfinished:
        host.play_round()
        assert host.round < 60
    assert (older.num_yields, younger.num_yields) == (0, 1)
    assert len(host.cache.free_list) + host.cache.tree.num_evictable == 20


def test_the_oldest_is_never_asked_and_the_youngest_is_asked_first() -> None:
    cache, one, two = a_pool(12)
    for session in (one, two, one, two):
        number = cache.begin(session, 1)
        cache.allocate(session, 3, number, 0.0)
    assert refused(cache, two, 1, 4) == 1 and asked(cache) == []  # nobody is younger
    assert refused(cache, one, 1, 1) == 1 and asked(cache) == [4]
    assert refused(cache, one, 2, 1) == 2 and asked(cache) == []  # one at a time
    cache.yielded(two, 4)
    assert refused(cache, one, 2, 1) == 2 and asked(cache) == [3]


def test_only_the_oldest_of_those_that_wait_to_grow_asks() -> None:
    cache, one, two = a_pool(9)
    for session in (one, two, one):
        cache.allocate(session, 3, cache.begin(session, 1), 0.0)
    assert refused(cache, two, 1, 2) == 1 and asked(cache) == [3]
    cache.end(one, 3)  # it finishes instead, though its pages are not free yet
    assert refused(cache, one, 1, 1) == 1 and asked(cache) == [2]
    cache.yielded(two, 2)
    assert refused(cache, two, 1, 2) == 1 and asked(cache) == []


def test_an_older_sequence_that_has_not_started_asks_when_nobody_waits_to_grow() -> None:
    cache, one, two = a_pool(8)
    first = cache.begin(one, 1)
    second = cache.begin(two, 1)
    pages = cache.allocate(two, 6, second, 0.0)
    assert refused(cache, one, 5, first) == 3 and asked(cache) == [second]
    cache.free(two, pages, 1.0)
    cache.yielded(two, second)
    assert refused(cache, two, 6, second) == 3  # of eight, five are waited for
    assert len(cache.allocate(one, 5, first, 0.0)) == 5 * 8


def test_a_younger_one_does_not_take_what_an_older_one_waits_for() -> None:
    """Two pages are free, the older one needs three: the younger gets none of the two, nor does
    one that has not started, nor a caller without a number. Once it is served, they do."""
    cache, one, two = a_pool(10)
    older = cache.begin(one, 1)
    younger = cache.begin(two, 1)
    newcomer = cache.begin(two, 1)
    cache.allocate(one, 4, older, 0.0)
    pages = cache.allocate(two, 4, younger, 0.0)
    assert refused(cache, one, 3, older) == 1
    assert refused(cache, two, 1, younger) == 1
    assert refused(cache, two, 1, newcomer) == 1
    assert refused(cache, two, 1, None) == 1
    cache.free(two, pages[:16], 1.0)
    cache.allocate(one, 3, older, 0.0)
    assert refused(cache, two, 1, None) == 1  # the page that is left is the younger one's
    assert refused(cache, two, 1, newcomer) == 1
    cache.allocate(two, 1, younger, 0.0)


def test_growth_goes_before_an_older_start() -> None:
    """What runs can finish and give back; what has not started would only hold more."""
    cache, one, two = a_pool(8)
    older = cache.begin(one, 1)
    younger = cache.begin(two, 1)
    cache.allocate(two, 5, younger, 0.0)
    assert refused(cache, one, 6, older) == 3
    cache.allocate(two, 2, younger, 0.0)
    assert refused(cache, two, 2, younger) == 1
    assert refused(cache, one, 1, older) == 1  # the page that is left waits for its growth


def test_the_cached_prefix_that_an_older_start_will_hold_is_kept_for_it() -> None:
    """Six of ten pages are free or cached, and four of those are the waiting one's own prefix. It
    needs three more than these; the younger one must not take any of the six meanwhile."""
    cache, one, two = a_pool(10)
    filler = cache.allocate(two, 4, None, 0.0)
    prefix = cache.allocate(one, 4, None, 0.0)
    cache.publish(one, MAIN, page_tokens("abcd"), prefix, None, 0.0)
    cache.free(one, prefix, 1.0)
    older = cache.begin(one, 1)
    younger = cache.begin(two, 1)
    prompt = page_tokens("abcd") + b"\0" * TOKEN_BYTES
    with pytest.raises(NoPages) as e:
        cache.acquire(one, MAIN, prompt, 7, older, 2.0)
    assert e.value.details["missing"] == 1
    assert refused(cache, two, 2, younger) == 2
    cache.free(two, filler[:8], 2.0)
    found = cache.acquire(one, MAIN, prompt, 7, older, 2.0)
    assert found.num_matched_pages == 4 and cache.tree.departures.pages["evicted"] == 0


def test_a_sequence_that_has_not_heard_is_told_again_when_it_asks() -> None:
    """The word to yield was lost. The younger one waits for a page, the older for the younger."""
    cache, one, two = a_pool(6)
    older, younger = cache.begin(one, 1), cache.begin(two, 1)
    cache.allocate(one, 3, older, 0.0)
    cache.allocate(two, 3, younger, 0.0)
    refused(cache, one, 1, older)
    assert asked(cache) == [younger]
    refused(cache, one, 1, older)
    assert asked(cache) == []
    refused(cache, two, 1, younger)
    assert asked(cache) == [younger]


def test_one_whose_worker_hangs_is_passed_over_after_a_while() -> None:
    cache, one, two = a_pool(12)
    for session in (one, two, two, one):
        cache.allocate(session, 3, cache.begin(session, 1), 0.0)
    assert refused(cache, one, 1, 1) == 1 and asked(cache) == [4]
    cache.queue.tick(10.0)
    cache.queue.tick(11.9)
    assert refused(cache, one, 1, 1) == 1 and asked(cache) == []
    cache.queue.tick(12.0)
    assert refused(cache, one, 1, 1) == 1 and asked(cache) == [3]
    assert refused(cache, one, 1, 1) == 1 and asked(cache) == []
    cache.yielded(one, 4)  # late, and welcome
    check_cache(cache)


def test_when_the_asked_one_dies_the_next_is_asked() -> None:
    cache, one, two = a_pool(6)
    first, second, third = cache.begin(one, 1), cache.begin(one, 1), cache.begin(two, 1)
    for session, number in ((one, first), (one, second), (two, third)):
        cache.allocate(session, 2, number, 0.0)
    refused(cache, one, 1, first)
    assert asked(cache) == [third]
    cache.end_session(two)
    refused(cache, one, 1, first)
    assert asked(cache) == [second]
    cache.release_session(two)
    while cache.sweep(1.0):
        pass
    cache.allocate(one, 1, first, 0.0)


def test_a_request_that_ends_gives_its_claim_back() -> None:
    cache, one, two = a_pool(4)
    older, younger = cache.begin(one, 1), cache.begin(two, 1)
    held = cache.allocate(two, 2, None, 0.0)
    refused(cache, one, 4, older)
    assert refused(cache, two, 2, younger) == 2
    cache.end(one, older)
    assert len(cache.allocate(two, 2, younger, 0.0)) == len(held)


# --- many sequences on several workers


@pytest.mark.parametrize("seed", range(10))
def test_every_sequence_finishes(seed: int) -> None:
    """Sequences of up to the whole pool, at up to four workers; some are cancelled, workers are
    killed (among them such as were just asked to yield), some notices are lost."""
    for i in range(40):
        rng = random.Random(seed * 40 + i)
        num_pages = rng.choice([8, 12, 24, 40])
        host = Host(num_pages, rng.randint(1, 4), rng, lost=rng.choice([0.0, 0.0, 0.3]))
        arrivals = [random_sequence(rng, num_pages) for _ in range(rng.randint(2, 14))]
        work = sum(len(sequence.letters) for sequence in arrivals)
        killings = rng.choice([0, 0, 1, 3])
        while arrivals or host.unfinished or host.dying:
            if arrivals and rng.random() < 0.5:
                rng.choice(host.workers).add(arrivals.pop())
            if host.unfinished and rng.random() < 0.02:
                cancel(host, rng.choice(host.unfinished))
            if killings and rng.random() < 0.1:
                killings -= 1
                told = [w for w in host.workers if w.notices]
                host.kill(rng.choice(told or host.workers))
            host.play_round()
            assert host.round <= work + 50, "somebody starves"
        assert host.cache.num_available == num_pages
        assert host.cache.queue.counts() == (0, 0)


def random_sequence(rng: random.Random, num_pages: int) -> Sequence:
    length = rng.randint(1, num_pages)
    letters = "".join(rng.choices("ab", [5, 1], k=length))
    return Sequence(letters, rng.randint(1, length))


def cancel(host: Host, sequence: Sequence) -> None:
    for worker in host.workers:
        if sequence in worker.waiting + worker.running:
            worker.finish(sequence)
