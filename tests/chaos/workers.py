"""Light workers killed at random under load: what they held comes back, and nobody else notices."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import Report, Row
from tests.chaos.content import Universe
from tests.chaos.crowd import Crowd
from tests.chaos.nursery import Child, nursery
from tests.chaos.service_times import Phases, p99
from tests.chaos.watch import Watch, process_use, until_fds
from tests.chaos.work import Options
from tests.chaos.world import ChaosDaemon, chaos_daemon

UNDISTURBED, KILLS = "undisturbed", "kills"
NAME = "workers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is done: `kills` in blocks, with as long a block without between them."""

    seed: int = 1
    kills: int = 1000
    workers: int = 8
    num_pages: int = 3000
    block_kills: int = 25
    pause_s: float = 0.08  # mean time between two kills
    audit_every: int = 1
    stops: float = 0.1  # so many of the victims are stopped before they are killed
    cuts: float = 0.1  # and so many are not killed but cut off, and end later


def play(report: Report, plan: Plan) -> None:
    """Rows for the table. Raises Broken where something is lost for good."""
    with tempfile.TemporaryDirectory() as directory, nursery() as children:
        folder = Path(directory)
        program = ("-m", "tests.chaos.timed", str(folder / "times"))
        with chaos_daemon(folder, num_pages=plan.num_pages, program=program) as daemon:
            _Run(report, plan, folder, daemon, Crowd(children, _options(plan, folder, daemon),
                 plan.workers)).play()  # fmt: skip


def _options(plan: Plan, folder: Path, daemon: ChaosDaemon) -> Options:
    universe = Universe(plan.seed, documents=40, suffixes=6)
    return Options(socket_dir=str(daemon.socket_dir), folder=str(folder), name="", seed=plan.seed,
                   universe=universe, pace_s=0.004)  # fmt: skip


class _Run:
    def __init__(
        self, report: Report, plan: Plan, folder: Path, daemon: ChaosDaemon, crowd: Crowd
    ) -> None:
        self._report, self._plan, self._folder = report, plan, folder
        self._daemon, self._crowd = daemon, crowd
        self._rng = random.Random(plan.seed)
        self._phases = Phases()
        self._back_s: list[float] = []
        self._held = 0  # pages, at holds' checks
        self._cuts = 0

    def play(self) -> None:
        plan, crowd = self._plan, self._crowd
        with self._daemon.attach("watching", "admin") as admin:
            watch = Watch(admin)
            self._daemon.attach("first").close()  # what the daemon opens once, for all workers
            watch.until_gone("first")
            fds_before = process_use(self._daemon.served_by)["fds"]
            crowd.fill()
            time.sleep(1.0)  # until the cache has what it evicts from
            before = process_use(self._daemon.served_by)
            done = 0
            while done < plan.kills:
                some = min(plan.block_kills, plan.kills - done)
                with self._phases.phase(UNDISTURBED):
                    self._wait(watch, some)
                with self._phases.phase(KILLS):
                    for _ in range(some):
                        self._strike(watch)
                done += some
                self._held += crowd.check_holds(watch)
                self._report.say(f"{done} of {plan.kills} ended; {len(crowd.violations())} wrong")
            crowd.end()
            self._daemon_use(before, until_fds(self._daemon.served_by, fds_before), fds_before)
            watch.all_given_back()
        self._daemon.check()
        self._rows(watch)

    def _wait(self, watch: Watch, beats: int) -> None:
        """What a block of kills is to the daemon, but for the kills."""
        for _ in range(beats):
            time.sleep(self._rng.expovariate(1 / self._plan.pause_s))
            watch.until_gone("nobody")
            self._look(watch)

    def _strike(self, watch: Watch) -> None:
        crowd, rng = self._crowd, self._rng
        time.sleep(rng.expovariate(1 / self._plan.pause_s))
        victim = crowd.pick(rng)
        chance = rng.random()
        if chance < self._plan.cuts:
            self._cut(victim)
        else:
            if chance < self._plan.cuts + self._plan.stops:
                victim.signal(signal.SIGSTOP)
                time.sleep(rng.random() * 0.05)
            killed_s = crowd.kill(victim)
            back_s = watch.until_gone(victim.name)
            self._back_s.append(back_s - killed_s)
        crowd.fill()
        self._look(watch)

    def _cut(self, victim: Child) -> None:
        self._crowd.cut(victim)
        self._cuts += 1
        victim.ended(10.0)  # what it holds is quarantined till then

    def _look(self, watch: Watch) -> None:
        watch.sums()
        if self._rng.random() * self._plan.audit_every < 1:
            watch.audit()

    # --- the table

    def _daemon_use(self, before: dict[str, int], after: dict[str, int], fds_before: int) -> None:
        self._report.add(Row(name="fds of the daemon, more than before", unit="", target=0,
                             value=after["fds"] - fds_before))  # fmt: skip
        grown = (after["rss_bytes"] - before["rss_bytes"]) / 2**20
        self._report.add(Row(name="memory of the daemon, more than before", unit="MiB",
                             value=round(grown, 2), target=16))  # fmt: skip

    def _rows(self, watch: Watch) -> None:
        report, crowd = self._report, self._crowd
        counters, violations = crowd.counters(), crowd.violations()
        findings = crowd.check_histories()
        report.extra |= {"counters": counters, "violations": violations[:50],
                         "findings": findings.told, "audits": watch.audits}  # fmt: skip
        back_ms = np.array(self._back_s) * 1e3
        add = report.add
        add(Row(name="workers killed", value=len(back_ms), unit=""))
        add(Row(name="workers cut off", value=self._cuts, unit=""))
        add(Row(name="requests completed", value=counters["requests"], unit=""))
        add(Row(name="pages verified", value=counters["pages_verified"], unit=""))
        add(Row(name="violations seen by workers", value=len(violations), unit="", target=0))
        add(Row(name="overlaps in the histories", value=findings.count, unit="", target=0,
                details={"spans": findings.spans}))  # fmt: skip
        add(Row(name="pages compared with kvd's holds", value=self._held, unit=""))
        add(Row(name="pages back, p99", value=round(float(np.quantile(back_ms, 0.99)), 1),
                unit="ms", target=1000,
                details={"p50_ms": float(np.median(back_ms)),
                         "max_ms": float(back_ms.max())}))  # fmt: skip
        file = self._folder / "times"
        for column, what in enumerate(("from the turn's beginning", "of handling")):
            quiet = p99(self._phases.samples(file, UNDISTURBED), column)
            loud = p99(self._phases.samples(file, KILLS), column)
            add(Row(name=f"service time {what}, p99, kills over undisturbed",
                    value=round(loud / quiet, 3), unit="x", target=1.5,
                    details={"undisturbed_us": quiet, "kills_us": loud,
                             "requests": len(self._phases.samples(file, KILLS))}))  # fmt: skip
