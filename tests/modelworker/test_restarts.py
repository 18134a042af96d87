"""kvd dies at any operation and comes back, with the pool or without it: every request gets the
tokens of an undisturbed run, once, and in the end nothing is held."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvd_shared import verbs
from kvd_shared.errors import DaemonUnreachable
from modelworker import engine, outage
from modelworker.requests import Failed
from modelworker.scheduler import Limits
from modelworker.tokenizer import Tokenizer
from tests.modelworker.host import Host
from tests.modelworker.in_process import (
    Worker,
    check_idle,
    finished,
    greedy,
    prompt_of,
    run,
    tokens_of,
)

PAGE_SIZE = 8


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(outage, "RETRY_S", 0.0)
    yield


def test_decoding_goes_on_without_kvd_as_far_as_leased_pages_reach(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    events = worker.submit("a", prompt_of(20), 60)
    for _ in range(3):
        worker.step()
    assert worker.client.session.leased
    before = len(tokens_of(events))
    host.kill()
    for _ in range(100):
        worker.step()
    alone = len(tokens_of(events)) - before
    assert alone >= PAGE_SIZE and worker.engine.health()["status"] == "away"
    host.start()
    run(worker)
    assert tokens_of(events) == greedy(prompt_of(20), 60)
    # nothing was computed twice
    assert worker.runner.num_computed == 20 + 59
    assert worker.engine.health()["status"] == "ok"
    check_idle(host)


def test_what_comes_while_kvd_is_away_is_done_when_it_is_back(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    host.kill()
    events = [worker.submit(str(i), prompt_of(20, i), 5) for i in range(3)]
    gone = worker.submit("gone", prompt_of(20, 9), 5)
    for _ in range(5):
        worker.step()
    worker.engine.cancel("gone")
    for _ in range(5):
        worker.step()
    assert not any(events) and worker.engine.health()["waiting"] == 3
    host.start()
    run(worker)
    for i, told in enumerate(events):
        assert tokens_of(told) == greedy(prompt_of(20, i), 5)
    assert not gone
    check_idle(host)


def test_pages_of_a_lost_answer_go_free(tokenizer: Tokenizer) -> None:
    """kvd gives a prompt its pages and dies before it says so."""
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    events = worker.submit("a", prompt_of(20), 5)
    host.dies_in = 2  # begin, acquire
    worker.step()
    assert not host.is_up and host.cache.num_available < 64
    host.start()
    worker.step()
    host.check()
    assert host.cache.num_available == 64
    run(worker)
    assert tokens_of(events) == greedy(prompt_of(20), 5)
    check_idle(host)


@pytest.mark.parametrize("done", range(4))
def test_what_a_request_computed_last_is_kept_though_it_ended_in_a_lost_step(
    tokenizer: Tokenizer, done: int
) -> None:
    """publish, free, end: as many of them as are done, its pages are in the tree afterwards."""
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    events = worker.submit("a", prompt_of(16), 1)
    worker.step()
    assert finished(events)
    host.dies_in = done
    worker.step()
    assert not host.is_up
    host.start()
    run(worker)
    assert host.cache.tree.num_pages == 2
    check_idle(host)


def test_what_was_to_be_published_is_published_again(tokenizer: Tokenizer) -> None:
    """By one that runs on: its prompt is there for others, whether kvd had heard of it or not."""
    for done in (0, 1):
        host = Host(64, PAGE_SIZE)
        worker = Worker(host, tokenizer)
        events = worker.submit("a", prompt_of(20), 30)
        worker.step()
        host.dies_in = done
        worker.step()
        assert not host.is_up
        host.start()
        for _ in range(3):
            worker.step()
        assert host.cache.tree.num_pages == 2 and not finished(events)
        run(worker)
        assert tokens_of(events) == greedy(prompt_of(20), 30)
        check_idle(host)


def test_a_short_restart_costs_nobody_a_session_or_their_age(tokenizer: Tokenizer) -> None:
    """Most of what was leased is not reached yet; all numbers are new, in the old order."""
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    told = [worker.submit(str(i), prompt_of(20, i), 60) for i in range(3)]
    for _ in range(6):
        worker.step()
    assert worker.client.session.leased
    scheduler = worker.engine._work.scheduler
    by_age = sorted(scheduler.running, key=lambda s: s.age)
    host.kill()
    host.start()
    worker.step()
    worker.step()
    assert sorted(scheduler.running, key=lambda s: s.age) == by_age
    run(worker)
    assert len(host.clients) == 1
    assert worker.runner.num_computed == 3 * (20 + 59)
    for i, events in enumerate(told):
        assert tokens_of(events) == greedy(prompt_of(20, i), 60)
    check_idle(host)


def test_requests_keep_their_age(tokenizer: Tokenizer) -> None:
    """The youngest is asked to yield, as before; also those that ran on were asked."""
    host, limits = Host(20, PAGE_SIZE), Limits(lease_ahead_s=0)
    left, right = (Worker(host, tokenizer, name, limits) for name in ("left", "right"))
    told = [w.submit("a", prompt_of(8, i), 88) for i, w in enumerate((left, right))]
    for _ in range(60):
        left.step()
        right.step()
    host.kill()
    host.start()
    right.step()  # resumes first, yet is the younger one: its number is the higher
    run(left, right)
    for i, events in enumerate(told):
        assert tokens_of(events) == greedy(prompt_of(8, i), 88)
    assert left.client.calls["yielded"] + right.client.calls["yielded"] >= 1
    check_idle(host)


@pytest.mark.parametrize("cold", [False, True])
def test_forks_whose_answer_is_lost_go_on_by_themselves(tokenizer: Tokenizer, cold: bool) -> None:
    for done in range(6):
        host = Host(64, PAGE_SIZE)
        worker = Worker(host, tokenizer)
        events = worker.submit("a", prompt_of(20), 12, n=3)
        worker.step()
        host.dies_in = done
        worker.step()
        assert not host.is_up
        host.start(cold=cold)
        run(worker)
        assert [tokens_of(events, i) for i in range(3)] == [greedy(prompt_of(20), 12)] * 3
        check_idle(host)


def test_a_cold_start_fails_nobody(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer, limits=Limits(max_sequences=4))
    told = [worker.submit(str(i), prompt_of(20 + i, i), 30, n=1 + i % 3) for i in range(5)]
    for _ in range(12):
        worker.step()
    old = worker.client
    host.kill()
    for _ in range(3):
        worker.step()
    host.start(cold=True)
    run(worker)
    for i, events in enumerate(told):
        for index in range(1 + i % 3):
            assert tokens_of(events, index) == greedy(prompt_of(20 + i, i), 30)
    assert worker.client is not old and old.closed
    check_idle(host)


def test_who_is_fenced_says_nothing_of_what_it_read(tokenizer: Tokenizer) -> None:
    """It is stopped in the middle of a step until its pages are another's, then goes on."""
    host = Host(12, PAGE_SIZE)
    slow, quick = Worker(host, tokenizer, "slow"), Worker(host, tokenizer, "quick")
    events = slow.submit("a", prompt_of(33), 30)
    for _ in range(9):
        slow.step()
    compute = slow.runner.run

    def stopped(chunks: list[object]) -> object:
        host.kill()
        host.start()
        quick.step()
        host.end_grace()
        quick.submit("b", prompt_of(40, 1), 8)
        run(quick)
        return compute(chunks)  # type: ignore[arg-type]

    slow.runner.run = stopped  # type: ignore[method-assign, assignment]
    before = list(events)
    slow.step()
    assert events == before and slow.client.closed
    run(slow, quick)
    assert tokens_of(events) == greedy(prompt_of(33), 30)
    check_idle(host)


def test_seeds_draw_the_same_over_a_discarded_step(tokenizer: Tokenizer) -> None:
    from modelworker.requests import SamplingParams

    def play(disturbed: bool) -> list[int]:
        host = Host(64, PAGE_SIZE)
        worker = Worker(host, tokenizer)
        params = SamplingParams(max_tokens=20, temperature=0.9, seed=3)
        events = worker.submit("a", prompt_of(20), 20, params=params)
        for _ in range(5):
            worker.step()
        if disturbed:
            worker.client.fenced = True
            worker.step()
            assert len(tokens_of(events)) == 5
        run(worker)
        return tokens_of(events)

    assert play(True) == play(False)


@pytest.mark.parametrize("slow_for", [1, 12])
def test_a_slow_daemon_is_asked_again_and_nothing_is_done_twice(
    tokenizer: Tokenizer, slow_for: int
) -> None:
    """Meanwhile decoding goes on, into pages that were leased."""
    for slow_in in range(20):
        host = Host(64, PAGE_SIZE)
        host.slow_for = slow_for
        worker = Worker(host, tokenizer)
        told = [worker.submit(str(i), prompt_of(20, i), 20, n=2) for i in range(2)]
        host.slow_in = slow_in
        run(worker)
        for i, events in enumerate(told):
            for index in range(2):
                assert tokens_of(events, index) == greedy(prompt_of(20, i), 20)
        assert len(host.clients) == 1
        check_idle(host)


def test_what_is_cancelled_while_kvd_is_slow_leaves_nothing(tokenizer: Tokenizer) -> None:
    """Whatever it had asked for: its number, its prompt's pages, or another page."""
    for slow_in in range(24):
        host = Host(64, PAGE_SIZE)
        host.slow_in, host.slow_for = slow_in, 3
        worker = Worker(host, tokenizer, limits=Limits(lease_ahead_s=0))
        worker.submit("a", prompt_of(14), 40, n=2)
        for _ in range(60):
            worker.step()
            if worker.engine.health()["status"] == "away":
                break
        worker.engine.cancel("a")
        run(worker)
        assert len(host.clients) == 1
        check_idle(host)


def test_an_outage_that_is_too_long_fails_everybody_with_an_error_to_retry(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    running = worker.submit("a", prompt_of(20), 300)
    for _ in range(5):
        worker.step()
    host.kill()
    worker.step()
    new = worker.submit("b", prompt_of(20), 5)
    monkeypatch.setattr(worker.engine._outage, "limit_s", 0.0)
    worker.step()
    for events in (running, new):
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, DaemonUnreachable)
    with pytest.raises(DaemonUnreachable, match="--kvd-outage-s"):
        worker.submit("c", prompt_of(20), 5)
    assert worker.engine.health()["status"] == "detached"
    host.start()
    run(worker)
    again = worker.submit("d", prompt_of(20), 5)
    run(worker)
    assert tokens_of(again) == greedy(prompt_of(20), 5)
    check_idle(host)


def test_a_refused_page_is_computed_anew(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It should not happen; whoever used such a page begins from its tokens."""
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    told = [worker.submit(str(i), prompt_of(20, i), 30) for i in range(2)]
    for _ in range(6):
        worker.step()
    host.kill()
    first, second = worker.engine._work.scheduler.running
    monkeypatch.setattr(worker.client, "refuses", {second.refs[1]})
    host.start()
    worker.step()  # sees that kvd was away
    worker.step()
    assert (first.num_computed > 0, second.num_computed) == (True, 0)
    run(worker)
    assert [tokens_of(events) for events in told] == [greedy(prompt_of(20, i), 30) for i in (0, 1)]
    check_idle(host)


def test_leases_go_back_when_pages_are_short(tokenizer: Tokenizer) -> None:
    """They keep nobody from running, and make nobody yield."""
    host = Host(8, PAGE_SIZE)
    left, right = Worker(host, tokenizer, "left"), Worker(host, tokenizer, "right")
    first = left.submit("a", prompt_of(8), 40)
    for _ in range(4):
        left.step()
    assert left.client.session.leased
    second = left.submit("b", prompt_of(30, 1), 2)
    third = right.submit("c", prompt_of(8, 2), 8)
    for _ in range(6):
        left.step()
    assert left.client.session.leased == {} and finished(second)
    run(left, right)
    assert tokens_of(first) == greedy(prompt_of(8), 40)
    assert tokens_of(third) == greedy(prompt_of(8, 2), 8)
    assert left.client.calls["yielded"] + right.client.calls["yielded"] == 0
    check_idle(host)


def test_what_no_restart_explains_fails_after_some_sessions(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug must not make the worker begin a request anew for ever."""
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    events = worker.submit("a", prompt_of(20), 5)
    monkeypatch.setattr(verbs, "acquire", lambda *_, **__: verbs.free([12345]))
    for _ in range(20):
        worker.step()
    (failed,) = events
    assert isinstance(failed, Failed) and failed.error.retryable
    assert len(host.clients) == 1 + engine.MOST_STRIKES
    monkeypatch.undo()
    again = worker.submit("b", prompt_of(20), 5)
    run(worker)
    assert tokens_of(again) == greedy(prompt_of(20), 5)
