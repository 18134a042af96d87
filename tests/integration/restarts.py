"""kvd killed again and again under two workers whose clients stream: who gets what, and when.

`play` is for a test; `play_alone`, with more kills, for the chaos harness.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.http_client import Client
from tests.integration.test_load import PAGE_SIZE, Ask, check_all_given_back
from tests.integration.tiny_world import PRINTABLE, Oracle, make_folder
from tests.worker import RunningWorker, WorkerNursery, worker_nursery

NUM_PAGES = 400
CLIENTS_A_WORKER = 3
BACK_WITHIN_S = 15.0


@dataclass(slots=True)
class Outcome:
    """`resumed_s`: from a kill until each worker went on with its session; `answered`: requests,
    all of them right; `token_gap_s`: the longest wait for a token behind the first one, in each
    stream that had begun before a kill and lived through it."""

    kills: int = 0
    answered: int = 0
    resumed_s: list[float] = field(default_factory=list)
    token_gap_s: list[float] = field(default_factory=list)
    lost_sessions: int = 0
    near_ties: int = 0

    def __str__(self) -> str:
        resumed, gaps = sorted(self.resumed_s), sorted(self.token_gap_s)
        return (
            f"{self.kills} kills, {self.answered} requests, all right ({self.near_ties} near-ties);"
            f" workers resumed after {_at(resumed, 0.5)} ms p50, {_at(resumed, 0.99)} ms p99;"
            f" the longest pause in a stream {_at(gaps, 0.5)} ms p50, {_at(gaps, 1)} ms at most;"
            f" sessions lost: {self.lost_sessions}"
        )


class Streams:
    """Clients that stream one answer after the other. No request may fail."""

    def __init__(self, oracle: Oracle, workers: list[RunningWorker], seed: int) -> None:
        self.outcome = Outcome()
        self.failures: list[BaseException] = []
        self._oracle, self._seed = oracle, seed
        self._asks = _asks(random.Random(seed))
        self._lock = threading.Lock()  # guards the outcome and the oracle
        self._over = False
        self._kills = 0
        self._threads = [
            threading.Thread(target=self._run, args=(worker, i))
            for i, worker in enumerate(workers * CLIENTS_A_WORKER)
        ]

    @contextmanager
    def running(self) -> Iterator[Outcome]:
        """On leaving, all that was begun is finished."""
        for thread in self._threads:
            thread.start()
        try:
            yield self.outcome
        finally:
            self._over = True
            for thread in self._threads:
                thread.join()
        if self.failures:
            raise self.failures[0]
        self.outcome.near_ties = self._oracle.near_ties

    def killed(self) -> None:
        """Whoever streams now lives through a kill."""
        self._kills += 1

    def until_answered(self, more: int) -> None:
        """Wait for so many answers from now on."""
        wanted = self.outcome.answered + more
        eventually(lambda: self.failures or self.outcome.answered >= wanted, 60)
        if self.failures:
            raise self.failures[0]

    def _run(self, worker: RunningWorker, i: int) -> None:
        rng = random.Random(self._seed * 1000 + i)
        client = Client(worker.url)
        try:
            while not self._over and not self.failures:
                self._ask(client, rng.choice(self._asks))
        except BaseException as e:
            self.failures.append(e)
        finally:
            client.close()

    def _ask(self, client: Client, ask: Ask) -> None:
        stream = client.stream(ask.prompt, ask.num_tokens)
        pieces = [next(stream)]
        kills, last_s, gap_s = self._kills, time.monotonic(), 0.0
        for piece in stream:
            now = time.monotonic()
            gap_s, last_s = max(gap_s, now - last_s), now
            pieces.append(piece)
        with self._lock:
            self._oracle.check(ask.prompt, ask.num_tokens, "".join(pieces))
            self.outcome.answered += 1
            if self._kills != kills:
                self.outcome.token_gap_s.append(gap_s)


@contextmanager
def kept_daemon_and_workers(
    nursery: WorkerNursery, folder: Path, tmp_path: Path, kills: int, daemon_settings: str = ""
) -> Iterator[tuple[RunningDaemon, list[RunningWorker]]]:
    """A daemon under a keeper that restarts it so often."""
    with running_daemon(
        tmp_path,
        model=folder,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        max_restarts=kills + 1,
        daemon_settings=daemon_settings,
    ) as daemon:
        workers = [nursery.start(daemon, name=name) for name in ("left", "right")]
        for worker in workers:
            _ = worker.url
        yield daemon, workers
        for worker in workers:
            assert not worker.ended() and "Traceback" not in worker.text(), worker.text()
            worker.close()


def play(
    nursery: WorkerNursery,
    folder: Path,
    oracle: Oracle,
    tmp_path: Path,
    *,
    kills: int,
    seed: int = 1,
) -> Outcome:
    """SIGKILL the daemon so often, at random moments under load. Raises what any client or worker
    got wrong."""
    rng = random.Random(seed)
    with kept_daemon_and_workers(nursery, folder, tmp_path, kills) as (daemon, workers):
        streams = Streams(oracle, workers, seed)
        with streams.running() as outcome:
            streams.until_answered(2)
            for _ in range(kills):
                time.sleep(rng.expovariate(1 / 0.5))
                streams.killed()
                outcome.resumed_s += kill_and_wait(daemon, workers)
                outcome.kills += 1
            streams.until_answered(2 * len(workers))
        outcome.lost_sessions = sum(len(worker.logs("kvd.lost")) for worker in workers)
        check_all_given_back(daemon, NUM_PAGES)
    return outcome


def play_alone(*, kills: int, seed: int = 1) -> Outcome:
    """The same, with a tiny model of its own: for the chaos harness."""
    with tempfile.TemporaryDirectory() as directory:
        folder, scratch = Path(directory) / "model", Path(directory) / "scratch"
        folder.mkdir()
        scratch.mkdir()
        make_folder(folder)
        with worker_nursery(folder, scratch) as nursery:
            return play(nursery, folder, Oracle(folder), scratch, kills=kills, seed=seed)


def kill_and_wait(daemon: RunningDaemon, workers: list[RunningWorker]) -> list[float]:
    """SIGKILL the daemon; seconds until each worker has a session that answers."""
    before = {worker.name: len(_returns(worker)) for worker in workers}
    killed_s = time.monotonic()
    os.kill(daemon.pid, signal.SIGKILL)
    back: dict[str, float] = {}
    while len(back) < len(workers):
        for worker in workers:
            if worker.name not in back and len(_returns(worker)) > before[worker.name]:
                back[worker.name] = time.monotonic() - killed_s
        assert time.monotonic() < killed_s + BACK_WITHIN_S, (daemon.text(), back)
        time.sleep(0.005)
    return list(back.values())


def _returns(worker: RunningWorker) -> list[object]:
    return [*worker.logs("kvd.resumed"), *worker.logs("kvd.attached")]


def _asks(rng: random.Random) -> list[Ask]:
    """Questions about a few documents, answered at some length."""

    def some(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.choices(PRINTABLE, k=rng.randint(least, most)))

    documents = [some(40, 120) for _ in range(5)]
    return [Ask(d + some(4, 40), rng.randint(60, 160)) for d in documents for _ in range(3)]


def _at(values: list[float], share: float) -> int:
    """In milliseconds."""
    return round(values[min(int(share * len(values)), len(values) - 1)] * 1e3) if values else 0
