"""Workers that are stopped while the daemon is killed, and wake up when they have been given up.

One, a holdout, reads and writes all the time; one of the crowd is a worker as any other. They are
fenced; what they read goes to others; then they go on as if no time had passed, and nothing wrong
may come of it. What was their own stays quarantined until they are dead.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from tests.benchmarks.harness import Report, Row
from tests.chaos.content import Universe
from tests.chaos.crowd import Crowd
from tests.chaos.nursery import nursery
from tests.chaos.stop import go_on, holdout, line, uses
from tests.chaos.watch import Watch
from tests.chaos.work import Options
from tests.chaos.world import ChaosDaemon, chaos_daemon
from tests.daemon import eventually

NAME = "fence"
LATE_S = 5.0  # that a fence may come after the end of the grace
REFUSED = {"SESSION_ENDED", "STALE_EPOCH", "DAEMON_UNREACHABLE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int = 1
    grace_s: float = 5.0
    stopped_s: float = 12.0  # after the restart
    workers: int = 4
    num_pages: int = 160


def play(report: Report, plan: Plan) -> None:
    settings = f"resume_grace_s = {plan.grace_s}\n"
    with tempfile.TemporaryDirectory() as directory, nursery() as children:
        folder = Path(directory)
        with chaos_daemon(
            folder, num_pages=plan.num_pages, keeper=True, daemon_settings=settings
        ) as daemon:
            universe = Universe(plan.seed, documents=40, suffixes=6)
            options = Options(socket_dir=str(daemon.socket_dir), folder=str(folder), name="",
                              seed=plan.seed, universe=universe)  # fmt: skip
            crowd = Crowd(children, options, plan.workers)
            with holdout(daemon, plan.seed) as process:
                _play(report, plan, daemon, crowd, process)


def _play(
    report: Report, plan: Plan, daemon: ChaosDaemon, crowd: Crowd, process: subprocess.Popen[bytes]
) -> None:
    taken = line(process)
    crowd.fill()
    time.sleep(0.5)
    sleeper = crowd.alive[0]
    process.send_signal(signal.SIGSTOP)
    sleeper.signal(signal.SIGSTOP)
    time.sleep(0.1)
    os.kill(daemon.served_by, signal.SIGKILL)
    daemon.until_ready()
    ready_s = time.monotonic()
    with daemon.attach("watching", "admin") as admin:
        seen = _Seen(admin, Watch(admin), taken["reads"], taken["writes"])
        while not daemon.logs("sessions.fenced"):
            assert time.monotonic() < ready_s + plan.grace_s + LATE_S, "nobody was fenced"
            seen.look(lambda: bool(daemon.logs("sessions.fenced")))
            time.sleep(0.05)
        fenced_s = time.monotonic() - ready_s
        admin.call(verbs.evict(plan.num_pages))
        while time.monotonic() < ready_s + plan.stopped_s:
            seen.look()
            crowd.fill()
            time.sleep(0.05)
        completed = crowd.counters()["requests"]
        sleeper.signal(signal.SIGCONT)
        said = go_on(process)
        seen.look()
        eventually(lambda: crowd.counters()["fenced"], 20.0)
        eventually(lambda: crowd.counters()["requests"] > completed, 20.0)
        process.kill()
        killed_s = time.monotonic()
        back_s = seen.watch.until_gone("holdout") - killed_s
        crowd.check_holds(seen.watch)
        crowd.end()
        seen.watch.all_given_back()
    daemon.check()
    rows = {
        "pages given to others before the fence": seen.too_early,
        "own pages of the fenced given to others before its death": seen.own_reused,
        "emitted by the fenced though it was wrong": int(said["emitted_wrong"]),
        "not told that it is fenced": int(not said["fenced"]),
        "own pages of the fenced overwritten": int(not said["own_right"]),
        "late requests answered otherwise than they must be": len(
            set(said["late"].values()) - REFUSED
        ),
        "violations seen by the others": len(crowd.violations()),
        "overlaps in the histories": crowd.check_histories().count,
    }
    add = report.add
    for what, value in rows.items():
        add(Row(name=what, value=value, target=0, unit="", details={"said": said}))
    add(Row(name="pages that it read, and that went to others after the fence", unit="", target=1,
            value=seen.reads_reused, higher_is_better=True))  # fmt: skip
    add(Row(name="workers fenced", value=crowd.counters()["fenced"] + said["fenced"], unit="",
            target=2, higher_is_better=True))  # fmt: skip
    add(Row(name="fenced after READY", value=round(fenced_s * 1e3), unit="ms"))
    add(Row(name="own pages back after its death", value=round(back_s * 1e3, 1), unit="ms"))


class _Seen:
    """What happens to the pages of the holdout that was stopped."""

    def __init__(self, admin: KvdClient, watch: Watch, reads: list[int], writes: list[int]) -> None:
        self._admin, self.watch = admin, watch
        self._reads, self._writes = reads, writes
        self.too_early = self.own_reused = self.reads_reused = 0

    def look(self, fenced: Callable[[], bool] = lambda: True) -> None:
        reads, own = self._reused(self._reads), self._reused(self._writes)
        self.own_reused = max(self.own_reused, own)
        self.reads_reused = max(self.reads_reused, reads)
        if not fenced():  # asked last: it may be fenced while the pages are looked at
            self.too_early = max(self.too_early, reads + own)
        self.watch.sums()
        self.watch.audit()

    def _reused(self, refs: list[int]) -> int:
        """How many of these pages are of another generation by now, or nobody's."""
        generations = [generation for generation, _ in uses(self._admin, refs)]
        return sum(now != ref >> 32 for ref, now in zip(refs, generations, strict=True))
