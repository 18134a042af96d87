"""One system prompt and many users: pages that are taken with and without sharing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from kvd_shared import verbs
from tests.benchmarks.claims.conversations import FIRST_TOKEN, VOCABULARY, with_cue
from tests.benchmarks.claims.plan import Ask, Outcome, Plan
from tests.benchmarks.claims.world import BenchWorker
from tests.daemon import RunningDaemon

NUM_USERS = 16
USER_TOKENS = (32, 128)  # after the system prompt, evenly drawn
ANSWER_TOKENS = 32
POLL_S = 0.004


@dataclass(frozen=True, slots=True)
class Shared:
    """`peak_pages`: the most that was held at one moment, as the daemon counts."""

    peak_pages: int
    cpu_s: float  # of all workers
    computed_tokens: int
    answers: list[list[int]]


def users(system_tokens: int, seed: int) -> list[Ask]:
    """Requests that begin with the same system prompt and quote from it."""
    random = np.random.default_rng((seed, system_tokens))
    system = random.integers(FIRST_TOKEN, VOCABULARY, system_tokens)
    asks = []
    for length in random.integers(*USER_TOKENS, NUM_USERS, endpoint=True):
        own = random.integers(FIRST_TOKEN, VOCABULARY, length)
        document = np.concatenate((system, own))
        asks.append(Ask(with_cue(document, ANSWER_TOKENS, random), ANSWER_TOKENS))
    return asks


def measure(
    daemon: RunningDaemon, workers: Sequence[BenchWorker], asks: Sequence[Ask], share: bool
) -> Shared:
    """All users at once, dealt out to the workers. With `share` an earlier request has left the
    system prompt in the cache, as in any service that runs for longer than a moment."""
    salt = f"{asks[0].prompt[:8]} {share}"
    if share:
        workers[0].run(Plan(asks=(Ask(asks[0].prompt, 1),), salt=salt))
    dealt = [tuple(asks[i :: len(workers)]) for i in range(len(workers))]
    with _watched(daemon) as peak:
        for i, (worker, mine) in enumerate(zip(workers, dealt, strict=True)):
            of_its_own = salt if share else f"{salt} {i}"
            worker.begin(Plan(asks=mine, salt=of_its_own, alone=not share))
        outcomes: list[Outcome] = [worker.outcome() for worker in workers]
    answers = [outcomes[i % len(workers)].answers[i // len(workers)] for i in range(len(asks))]
    return Shared(
        peak[0],
        sum(outcome.cpu_s for outcome in outcomes),
        sum(outcome.computed_tokens for outcome in outcomes),
        answers,
    )


@contextmanager
def _watched(daemon: RunningDaemon) -> Iterator[list[int]]:
    """The list's one element is, on leaving, the most pages that sessions held at one moment."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        with daemon.attach("asking", "admin") as admin:
            while not done.is_set():
                counts = admin.call(verbs.pages())["counts"]
                peak[0] = max(peak[0], sum(counts[s] for s in ("writing", "active", "duplicate")))
                time.sleep(POLL_S)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
