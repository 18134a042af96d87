"""The daemon killed at random under load: it comes back warm, and the workers go on.

A keeper restarts it. The universe is smaller than the pool, so nothing is ever evicted: whatever a
worker knows to be published must be found after every restart, page for page.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from tests.benchmarks.harness import Report, Row
from tests.chaos.checker import known_pages
from tests.chaos.content import PAGE_SIZE, Universe
from tests.chaos.content import Path as Sequence
from tests.chaos.crowd import Crowd
from tests.chaos.filling import fill
from tests.chaos.history import Kind
from tests.chaos.nursery import nursery
from tests.chaos.watch import Broken, Watch, cpu_s, process_use
from tests.chaos.work import Options
from tests.chaos.world import ChaosDaemon, chaos_daemon

NAME = "daemon"
BACK_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int = 1
    kills: int = 200
    workers: int = 4
    num_pages: int = 65_536
    documents: int = 480  # some 39,000 pages of prompts
    suffixes: int = 12
    pause_s: float = 0.7  # mean time from READY to the next kill


def play(report: Report, plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as directory, nursery() as children:
        folder = Path(directory)
        with chaos_daemon(folder, num_pages=plan.num_pages, keeper=True) as daemon:
            universe = Universe(plan.seed, documents=plan.documents, suffixes=plan.suffixes)
            options = Options(socket_dir=str(daemon.socket_dir), folder=str(folder), name="",
                              seed=plan.seed, universe=universe)  # fmt: skip
            _Run(report, plan, universe, daemon, Crowd(children, options, plan.workers)).play()


class _Run:
    def __init__(
        self, report: Report, plan: Plan, universe: Universe, daemon: ChaosDaemon, crowd: Crowd
    ) -> None:
        self._report, self._plan, self._universe = report, plan, universe
        self._daemon, self._crowd = daemon, crowd
        self._rng = random.Random(plan.seed)
        self._ready_s: list[float] = []
        self._start_cpu_s: list[float] = []
        self._resumed_s: list[float] = []
        self._lost = self._kept = 0
        self._use: list[dict[str, int]] = []

    def play(self) -> None:
        plan, crowd = self._plan, self._crowd
        with self._daemon.attach("filling") as filler:
            pages = fill(filler, self._universe)
        self._report.say(f"{pages:,} of {plan.num_pages:,} pages are cached")
        crowd.fill()
        for number in range(1, plan.kills + 1):
            time.sleep(self._rng.expovariate(1 / plan.pause_s))
            self._kill()
            if number % 10 == 0:
                self._report.say(
                    f"{number} of {plan.kills} kills; READY after "
                    f"{max(self._ready_s) * 1e3:.0f} ms at most; {self._lost} pages lost, "
                    f"{len(crowd.violations())} wrong"
                )
        with self._daemon.attach("watching", "admin") as admin:
            watch = Watch(admin)
            crowd.check_holds(watch)
            crowd.end()
            watch.all_given_back()
        assert "Traceback" not in self._daemon.text(), self._daemon.text()[-4000:]
        self._rows()

    def _kill(self) -> None:
        known = self._known()
        killed_s = time.monotonic()
        os.kill(self._daemon.served_by, signal.SIGKILL)
        self._ready_s.append(self._daemon.until_ready() - killed_s)
        self._start_cpu_s.append(cpu_s(self._daemon.served_by))
        self._resumed_s += self._until_resumed(killed_s)
        with self._daemon.attach("watching", "admin") as admin:
            watch = Watch(admin)
            watch.sums()
            watch.audit()
        with self._daemon.attach("looking") as looking:
            self._look_for(looking, known)
        self._use.append(process_use(self._daemon.served_by))

    def _known(self) -> dict[int, int]:
        """What some worker has been told is published, before the kill."""
        known = known_pages(self._crowd.records().values())
        for path in self._universe.paths():  # what the pool was filled with
            full = len(self._universe.tokens(path)) // PAGE_SIZE
            known[path.number] = max(known[path.number], full)
        return known

    def _look_for(self, client: KvdClient, known: dict[int, int]) -> None:
        """Each known sequence matches as far as it was published. (A match leaves one token.)"""
        numbers = list(known)
        for start in range(0, len(numbers), 200):
            some = numbers[start : start + 200]
            calls = []
            for number in some:
                path = Sequence.of(number)
                tokens = self._universe.tokens(path)[: known[number] * PAGE_SIZE]
                # one token more, so that all of its pages may match
                calls.append(verbs.probe(self._universe.namespace(path), [*tokens.tolist(), 0]))
            found = client.call(verbs.step(calls), timeout_s=20.0)
            for number, tokens_found in zip(some, found, strict=True):
                missing = known[number] - tokens_found // PAGE_SIZE
                self._lost += max(0, missing)
                self._kept += known[number] - max(0, missing)

    def _until_resumed(self, killed_s: float) -> list[float]:
        """Seconds from the kill until each worker's session went on, or a new one began."""
        deadline = time.monotonic() + BACK_WITHIN_S
        while True:
            back = {}
            for name, records in self._crowd.records().items():
                went_on = np.isin(records["kind"], (Kind.RESUMED, Kind.ATTACHED))
                times = records["t"][went_on & (records["t"] > killed_s)]
                if len(times):
                    back[name] = float(times[0]) - killed_s
            if len(back) == len(self._crowd.alive):
                return list(back.values())
            if time.monotonic() > deadline:
                raise Broken(f"workers are not back {BACK_WITHIN_S} s after a kill: {back}")
            self._crowd.fill()
            time.sleep(0.01)

    def _rows(self) -> None:
        crowd, add = self._crowd, self._report.add
        counters, violations = crowd.counters(), crowd.violations()
        findings = crowd.check_histories()
        self._report.extra |= {"counters": counters, "violations": violations[:50],
                               "findings": findings.told, "use": self._use[-3:]}  # fmt: skip
        ready_ms, resumed_ms = np.array(self._ready_s) * 1e3, np.array(self._resumed_s) * 1e3
        add(Row(name="kills of the daemon", value=len(ready_ms), unit=""))
        add(Row(name="requests completed", value=counters["requests"], unit=""))
        add(Row(name="pages verified", value=counters["pages_verified"], unit=""))
        add(Row(name="READY after, p99", value=_p99(ready_ms), unit="ms", target=1000, aim=300,
                details={"p50_ms": float(np.median(ready_ms)),
                         "max_ms": float(ready_ms.max())}))  # fmt: skip
        add(Row(name="CPU time of a start until READY, median", unit="ms",
                value=round(float(np.median(self._start_cpu_s)) * 1e3)))  # fmt: skip
        add(Row(name="workers resumed after, p99", value=_p99(resumed_ms), unit="ms", target=2000,
                aim=1000, details={"p50_ms": float(np.median(resumed_ms))}))  # fmt: skip
        add(Row(name="sessions resumed", value=counters["resumed"], unit=""))
        add(Row(name="sessions begun anew", unit="", target=0,
                value=counters["attached"] - len(crowd.names)))  # fmt: skip
        add(Row(name="published pages looked for", value=self._kept + self._lost, unit=""))
        add(Row(name="published pages lost", value=self._lost, unit="", target=0))
        add(Row(name="violations seen by workers", value=len(violations), unit="", target=0))
        add(Row(name="overlaps in the histories", value=findings.count, unit="", target=0))
        grown = (self._use[-1]["rss_bytes"] - self._use[0]["rss_bytes"]) / 2**20
        add(Row(name="memory of the last daemon, more than of the first", value=round(grown, 1),
                unit="MiB"))  # fmt: skip
        add(Row(name="fds of the last daemon, more than of the first", unit="",
                value=self._use[-1]["fds"] - self._use[0]["fds"]))  # fmt: skip


def _p99(values: np.ndarray) -> float:
    return round(float(np.quantile(values, 0.99)), 1)
