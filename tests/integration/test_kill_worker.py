"""Processes that die without a word, under load: nothing leaks and nothing turns wrong."""

from __future__ import annotations

import http.client
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from tests.daemon import eventually, running_daemon
from tests.integration.http_client import Client, Refused
from tests.integration.test_load import PAGE_SIZE, Ask, check_all_given_back, two_workers
from tests.integration.tiny_world import PRINTABLE, Oracle
from tests.worker import RunningWorker, WorkerNursery

NUM_KILLS = 50
NUM_PAGES = 120
BACK_WITHIN_S = 1.0
RETRYABLE = {"DAEMON_UNREACHABLE", "SESSION_ENDED", "DRAINING"}


def make_asks(rng: random.Random) -> list[Ask]:
    def some(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.choices(PRINTABLE, k=rng.randint(least, most)))

    documents = [some(40, 120) for _ in range(6)]
    return [Ask(d + some(4, 40), rng.randint(8, 40)) for d in documents for _ in range(5)]


class Load:
    """Clients that ask one worker without pause until the load ends. `targets[i]` is the worker of
    client i, and may be changed. Every answer that comes is checked; `ended` counts how requests
    ended, by target's name and outcome."""

    def __init__(self, oracle: Oracle, targets: list[RunningWorker]) -> None:
        self.targets = targets
        self.ended: Counter[tuple[str, str]] = Counter()
        self.failures: list[BaseException] = []
        self._oracle = oracle
        self._asks = make_asks(random.Random(3))
        self._lock = threading.Lock()
        self._over = False
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(len(targets))]

    @contextmanager
    def running(self) -> Iterator[Load]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._over = True
            for thread in self._threads:
                thread.join()
        assert not self.failures, self.failures[0]

    def count(self, name: str, outcome: str) -> int:
        return self.ended[name, outcome]

    def until_all_answered(self) -> None:
        """Wait until every worker has answered, from now on, one request at least."""
        before = {worker.name: self.count(worker.name, "answered") for worker in self.targets}
        eventually(lambda: all(self.count(n, "answered") > c for n, c in before.items()), 20)

    def _run(self, i: int) -> None:
        rng = random.Random(i)
        while not self._over and not self.failures:
            worker = self.targets[i]
            try:
                outcome = self._request(worker, rng)
            except BaseException as e:
                self.failures.append(e)
                return
            with self._lock:
                self.ended[worker.name, outcome] += 1
            if outcome != "answered":
                time.sleep(0.02)

    def _request(self, worker: RunningWorker, rng: random.Random) -> str:
        ask = rng.choice(self._asks)
        try:
            client = Client(worker.url)
            text = "".join(client.stream(ask.prompt, ask.num_tokens))
            client.close()
        except Refused as e:
            assert e.code in RETRYABLE and e.status in (200, 503), e
            return "refused"
        except (OSError, http.client.HTTPException) as e:
            assert worker.killed, e
            return "broken"
        with self._lock:
            self._oracle.check(ask.prompt, ask.num_tokens, text)
        return "answered"


class Watch:
    """An admin's session that stays."""

    def __init__(self, admin: KvdClient) -> None:
        self._admin = admin

    def held_by(self, name: str) -> int | None:
        """Pages that the session of that name holds, None if there is no such session."""
        listed = self._admin.call(verbs.sessions())["sessions"]
        return next((s["held_pages"] for s in listed if s["name"] == name), None)

    def until_gone(self, name: str) -> None:
        """Wait until the session of that name, and all that it held, is gone."""
        deadline = time.monotonic() + 10
        while self.held_by(name) is not None:
            assert time.monotonic() < deadline, f"{name} is still there"
            time.sleep(0.001)

    def check(self) -> None:
        audit = self._admin.call(verbs.audit())
        assert audit["ok"], audit["finding"]
        assert self._admin.call(verbs.pages())["counts"]["quarantined"] == 0


def test_fifty_workers_killed_under_load(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """One worker after the other dies at a random moment; their neighbour does not notice."""
    rng = random.Random(11)
    back_s: list[float] = []
    held: list[int] = []
    with (
        running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES) as daemon,
        daemon.attach("watching", "admin") as admin,
    ):
        watch = Watch(admin)
        survivor = nursery.start(daemon, name="survivor")
        standby = nursery.start(daemon, name="victim-0")
        load = Load(oracle, [survivor] * 2 + [standby] * 4)
        _ = survivor.url, standby.url
        with load.running():
            for i in range(NUM_KILLS):
                victim, standby = standby, nursery.start(daemon, name=f"victim-{i + 1}")
                load.targets[2:] = [victim] * 4
                _ = victim.url
                time.sleep(rng.uniform(0, 0.4))
                held.append(watch.held_by(victim.name) or 0)
                killed_s = time.monotonic()
                victim.kill()
                watch.until_gone(victim.name)
                back_s.append(time.monotonic() - killed_s)
                watch.check()
                victim.close()
            answers_before_end = load.count("survivor", "answered")
        assert not any(name == "survivor" and how != "answered" for name, how in load.ended)
        assert answers_before_end > NUM_KILLS and max(back_s) < BACK_WITHIN_S
        assert sum(map(bool, held)) > NUM_KILLS // 2, held
        standby.close()
        eventually(lambda: watch.held_by(standby.name) is None)
        eventually(lambda: watch.held_by("survivor") == 0)
        check_all_given_back(daemon, NUM_PAGES)
        survivor.close()
    outcomes = Counter(how for name, how in load.ended.elements() if name != "survivor")
    print(
        f"{NUM_KILLS} kills, {sum(map(bool, held))} of them with pages held (mean "
        f"{sum(held) / NUM_KILLS:.0f}); pages back after {max(back_s) * 1000:.0f} ms at most, "
        f"mean {sum(back_s) / NUM_KILLS * 1000:.0f} ms; survivor answered "
        f"{load.count('survivor', 'answered')}, victims {dict(outcomes)}"
    )


def test_workers_killed_while_they_start(
    nursery: WorkerNursery, folder: Path, tmp_path: Path
) -> None:
    rng = random.Random(12)
    with (
        running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES) as daemon,
        daemon.attach("watching", "admin") as admin,
    ):
        watch = Watch(admin)
        for _ in range(10):
            victim = nursery.start(daemon, name="victim")
            time.sleep(rng.uniform(0, 0.15))
            victim.close()
            watch.until_gone("victim")
            watch.check()
        check_all_given_back(daemon, NUM_PAGES)


def test_the_daemon_killed_under_load(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """Nobody keeps the pool: requests wait, and are computed anew in that of the next daemon. The
    workers say that kvd is away. (tests/integration/test_restart.py: with a keeper.)"""
    with two_workers(nursery, folder, tmp_path, NUM_PAGES) as (daemon, workers):
        load = Load(oracle, workers * 3)
        with load.running():
            for _ in range(3):
                load.until_all_answered()
                daemon.kill()
                eventually(lambda: [_status(w.url) for w in workers] == ["away"] * 2)
                daemon.start()
            load.until_all_answered()
        assert {how for _, how in load.ended} == {"answered"}
        assert [_status(worker.url) for worker in workers] == ["ok", "ok"]
        check_all_given_back(daemon, NUM_PAGES)


def test_the_daemon_stopped_under_load(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """SIGTERM: what has begun gets its answer, what comes later waits for the next daemon."""
    with two_workers(nursery, folder, tmp_path, NUM_PAGES) as (daemon, workers):
        load = Load(oracle, workers * 3)
        prompt = tuple(range(PRINTABLE.start, PRINTABLE.start + 40))
        with load.running():
            pieces = Client(workers[0].url).stream(prompt, 400)
            first = next(pieces)
            daemon.process.send_signal(signal.SIGTERM)
            oracle.check(prompt, 400, first + "".join(pieces))
            assert daemon.wait() == 0
            assert not daemon.logs("daemon.drain_cut_short")
            daemon.start()
            load.until_all_answered()
        assert {how for _, how in load.ended} == {"answered"}


def _status(url: str) -> Any:
    client = Client(url)
    try:
        return client.health()["status"]
    finally:
        client.close()
