"""Any load over any restarts."""

from __future__ import annotations

import random

import pytest

from modelworker import outage
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
from tests.modelworker.test_scheduler import check_worker

PAGE_SIZE = 8


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "RETRY_S", 0.0)


@pytest.mark.parametrize("seed", range(12))
def test_any_load_over_any_restarts(tokenizer: Tokenizer, seed: int) -> None:
    """Three workers in a tiny pool; kvd dies between any two operations, comes back warm or cold,
    once or twice in a row, with all workers or with some that come too late."""
    rng = random.Random(seed)
    num_pages = rng.choice([8, 12, 30])
    host = Host(num_pages, PAGE_SIZE)
    limits = Limits(
        max_batch_tokens=rng.choice([4, 16, 64]),
        max_sequences=rng.choice([2, 5, 20]),
        lease_ahead_s=rng.choice([0.0, 2.0]),
    )
    workers = [Worker(host, tokenizer, f"worker {i}", limits) for i in range(3)]
    documents = [prompt_of(rng.randint(1, 20), seed) for seed in range(3)]
    asked: dict[tuple[Worker, str], tuple[list[int], int, int]] = {}
    cancelled: set[tuple[Worker, str]] = set()
    asleep: set[Worker] = set()
    for turn in range(250):
        worker = rng.choice(workers)
        if rng.random() < 0.15:
            prompt = [*rng.choice(documents), *prompt_of(rng.randint(1, 12), rng.randrange(20))]
            new = max(1, rng.randint(1, num_pages * PAGE_SIZE - len(prompt)) // rng.choice([1, 4]))
            n = rng.choice([1, 1, 1, 3])
            worker.submit(str(turn), prompt, new, n=n, use_cache=rng.random() < 0.9)
            asked[worker, str(turn)] = prompt, new, n
        if rng.random() < 0.05 and asked:
            chosen = rng.choice(list(asked))
            cancelled.add(chosen)
            chosen[0].engine.cancel(chosen[1])
        if not host.is_up and rng.random() < 0.3:
            host.start(cold=rng.random() < 0.2)
            asleep = set(rng.sample(workers, rng.choice([0, 0, 0, 1, 2])))
        elif host.is_up and rng.random() < 0.06:
            host.dies_in = rng.randint(0, 12)
        elif host.is_up and rng.random() < 0.02:
            host.kill()
        elif host.is_up and rng.random() < 0.03:
            host.slow_in, host.slow_for = rng.randint(0, 3), rng.choice([1, 20])
        if host.is_up and rng.random() < 0.1:
            host.end_grace()
            asleep.clear()
        worker = rng.choice(workers)
        if worker not in asleep:
            worker.step()
            check_worker(worker)
            host.check()
    if not host.is_up:
        host.start()
    host.dies_in = host.slow_in = None
    run(*workers, steps=20_000)
    for (worker, request_id), (prompt, new, n) in asked.items():
        events = worker.events[request_id]
        expected = greedy(prompt, new)
        for index in range(n):
            tokens = tokens_of(events, index)
            assert tokens == expected[: len(tokens)]
        if (worker, request_id) not in cancelled:
            assert {end.index for end in finished(events)} == set(range(n))
            assert {end.num_generated for end in finished(events)} == {new}
    host.end_grace()
    check_idle(host)
