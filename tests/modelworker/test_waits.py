"""No prefix is computed twice at the same time: two workers over one cache, step by step."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from kvd_shared.rpc import Notice
from kvd_shared.verbs import MatchResult
from modelworker import waits
from modelworker.pace import FIRST_GUESS, PrefillPace
from modelworker.scheduler import Limits
from modelworker.sequence import Sequence
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
PROMPT = prompt_of(64)
CHUNKED = Limits(max_batch_tokens=16)
PATIENCE_S = 2 * 56 / FIRST_GUESS  # all full pages but the last token's, twice


class Clock:
    """Stands for time.monotonic, for workers and cache alike."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def pair(tokenizer: Tokenizer, limits: Limits = CHUNKED) -> tuple[Host, Worker, Worker]:
    host = Host(64, PAGE_SIZE)
    return host, Worker(host, tokenizer, "left", limits), Worker(host, tokenizer, "right", limits)


def test_the_second_worker_waits_and_computes_the_last_token_alone(tokenizer: Tokenizer) -> None:
    host, left, right = pair(tokenizer)
    told = [worker.submit("a", PROMPT, 5) for worker in (left, right)]
    run(left, right)
    assert [tokens_of(events) for events in told] == [greedy(PROMPT, 5)] * 2
    # of the prompt's last page, 7 tokens are copied: a match leaves the last token to compute
    assert (left.runner.num_computed, right.runner.num_computed) == (64 + 4, 1 + 4)
    assert [finished(events)[0].cached_tokens for events in told] == [0, 63]
    assert host.cache.counters.duplicate_pages == 1  # that copy, once its last token was there
    check_idle(host)


def test_so_it_is_within_one_worker(tokenizer: Tokenizer) -> None:
    host, worker, _ = pair(tokenizer, Limits())
    told = [worker.submit(str(i), [*PROMPT, i], 3) for i in range(4)]
    run(worker)
    for i, events in enumerate(told):
        assert tokens_of(events) == greedy([*PROMPT, i], 3)
    assert worker.runner.num_computed == 64 + 4 * (1 + 2)
    check_idle(host)


def test_who_waits_does_not_keep_others_waiting(tokenizer: Tokenizer) -> None:
    host, left, right = pair(tokenizer, Limits(max_batch_tokens=16, max_sequences=1))
    left.submit("a", PROMPT, 3)
    left.step()
    waiter = right.submit("a", PROMPT, 3)
    right.step()
    assert right.client.session.num_held_pages == 0
    other = right.submit("b", prompt_of(10, 1), 3)
    while not finished(other):
        right.step()
    assert not tokens_of(waiter)
    run(left, right)
    assert tokens_of(waiter) == greedy(PROMPT, 3)
    check_idle(host)


def test_without_the_cache_nobody_announces_or_waits(tokenizer: Tokenizer) -> None:
    host, left, right = pair(tokenizer)
    told = [worker.submit("a", PROMPT, 3, use_cache=False) for worker in (left, right)]
    for worker in (left, right):
        worker.step()
        assert not host.cache.announcements
    run(left, right)
    assert [tokens_of(events) for events in told] == [greedy(PROMPT, 3)] * 2
    assert left.runner.num_computed == right.runner.num_computed == 64 + 2


@pytest.mark.parametrize("steps", range(1, 5))
def test_the_waiting_one_goes_on_where_the_computing_one_died(
    tokenizer: Tokenizer, steps: int
) -> None:
    host, left, right = pair(tokenizer)
    left.submit("a", PROMPT, 3)
    left.step()
    events = right.submit("a", PROMPT, 3)
    right.step()
    for _ in range(steps - 1):
        left.step()
    left.client.close()
    run(right)
    assert tokens_of(events) == greedy(PROMPT, 3)
    # what the dead one had published was not computed again; its last chunk had not been
    assert right.runner.num_computed == 64 - 16 * (steps - 1) + 2
    check_idle(host)


@pytest.mark.parametrize("end", ["cancel", "yield"])
def test_the_waiting_one_goes_on_where_the_computing_one_stopped(
    tokenizer: Tokenizer, end: str
) -> None:
    host, left, right = pair(tokenizer)
    left.submit("a", PROMPT, 3)
    left.step()
    events = right.submit("a", PROMPT, 3)
    right.step()
    if end == "cancel":
        left.engine.cancel("a")
    else:
        left.client.noticed.append(Notice("yield", 1))
    run(left, right)
    assert tokens_of(events) == greedy(PROMPT, 3)
    assert left.runner.num_computed + right.runner.num_computed <= 64 + 2 * 16 + 2 * 2
    check_idle(host)


def test_a_waiting_request_can_be_cancelled(tokenizer: Tokenizer) -> None:
    host, left, right = pair(tokenizer)
    left.submit("a", PROMPT, 3)
    left.step()
    events = right.submit("a", PROMPT, 3)
    right.step()
    right.engine.cancel("a")
    run(left, right)
    assert not events and not right.runner.batches
    check_idle(host)


def test_a_worker_that_is_stopped_finishes_what_waits(tokenizer: Tokenizer) -> None:
    host, left, right = pair(tokenizer)
    left.submit("a", PROMPT, 3)
    left.step()
    events = right.submit("a", PROMPT, 3)
    right.step()
    right.engine.stop()
    run(left, right)
    right.engine.run()
    assert tokens_of(events) == greedy(PROMPT, 3)
    check_idle(host)


def test_a_session_that_is_lost_while_it_waits(tokenizer: Tokenizer) -> None:
    host, left, right = pair(tokenizer)
    told = left.submit("a", PROMPT, 3)
    left.step()
    right.submit("a", PROMPT, 3)
    right.step()
    right.client.close()
    run(left)
    assert tokens_of(told) == greedy(PROMPT, 3)
    check_idle(host)


def test_a_lost_notice_costs_a_moment(tokenizer: Tokenizer, clock: Clock) -> None:
    host, left, right = pair(tokenizer)
    left.submit("a", PROMPT, 1)
    left.step()
    events = right.submit("a", PROMPT, 1)
    right.step()
    run(left)
    right.client.noticed.clear()
    right.step()
    clock.now += PATIENCE_S - 0.01
    right.step()
    assert not events
    clock.now += 0.02
    run(right)
    assert tokens_of(events) == greedy(PROMPT, 1)
    assert right.runner.num_computed == 1
    check_idle(host)


def test_after_two_waits_without_progress_it_computes_by_itself(
    tokenizer: Tokenizer, clock: Clock
) -> None:
    """The computing worker hangs, and kvd does not see it: nothing ticks here."""
    host, left, right = pair(tokenizer)
    left.submit("a", PROMPT, 1)
    left.step()
    events = right.submit("a", PROMPT, 1)
    right.step()
    for announcement in host.cache.announcements:
        announcement.interval_s = 1e9
    for futile in range(1, waits.MAX_FUTILE + 1):
        assert not right.runner.batches, f"{futile} waits"
        clock.now += PATIENCE_S
        right.step()
    run(right)
    assert tokens_of(events) == greedy(PROMPT, 1)
    assert right.client.calls["acquire"] == 1 + waits.MAX_FUTILE
    run(left)
    check_idle(host)


def test_progress_keeps_it_waiting(tokenizer: Tokenizer, clock: Clock) -> None:
    _, left, right = pair(tokenizer)
    left.submit("a", PROMPT, 1)
    left.step()
    events = right.submit("a", PROMPT, 1)
    right.step()
    for _ in range(3):
        clock.now += 0.9 * PATIENCE_S
        left.step()
        right.step()
    assert not right.runner.batches and right.client.calls["acquire"] == 1
    run(left, right)
    assert tokens_of(events) == greedy(PROMPT, 1)
    assert right.runner.num_computed == 1


def test_who_is_much_faster_does_not_wait(tokenizer: Tokenizer, clock: Clock) -> None:
    host, left, right = pair(tokenizer)
    left.submit("a", PROMPT, 1)
    left.step()
    clock.now += 1.0
    left.step()  # publishes 16 tokens after a second: 48 more take it 3 seconds
    right.engine._work._pace.note(100, 1.0)
    events = right.submit("a", PROMPT, 1)
    right.step()
    assert right.runner.batches == [[16]]
    run(left, right)
    assert tokens_of(events) == greedy(PROMPT, 1)
    check_idle(host)


@pytest.mark.parametrize(
    ("pending_s", "patience_s"), [(0.001, 0.25), (1.0, 2.0), (60.0, 5.0), (None, 0.64)]
)
def test_patience_is_twice_the_estimate_within_bounds(
    pending_s: float | None, patience_s: float
) -> None:
    sequence = cast(Sequence, SimpleNamespace(age=1, futile_waits=0))
    found = MatchResult(np.empty(0, np.int64), 2, 32, "pending", None, 0, 64, pending_s)
    waiting = waits.Waits()
    waiting.begin(sequence, found, 100.0, 7.0)
    assert waiting.is_on(sequence, 7.0 + patience_s - 0.001)
    assert not waiting.is_on(sequence, 7.0 + patience_s + 0.001)


def test_the_pace_is_that_of_the_latest_steps() -> None:
    pace = PrefillPace()
    assert pace.tokens_per_s == FIRST_GUESS
    pace.note(8, 1.0)  # too few to tell
    assert pace.tokens_per_s == FIRST_GUESS
    pace.note(500, 0.5)
    assert pace.tokens_per_s == pytest.approx(1000)
    for _ in range(30):
        pace.note(500, 0.25)
    assert pace.tokens_per_s == pytest.approx(2000, rel=0.01)
