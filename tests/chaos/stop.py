"""A worker that is stopped in the middle of its reading and writing, longer than any timeout, while
the pool is full and others ask; then it goes on, as if no time had passed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from tests.benchmarks.harness import Report, Row
from tests.chaos.content import Universe
from tests.chaos.crowd import Crowd
from tests.chaos.nursery import nursery
from tests.chaos.watch import Watch
from tests.chaos.work import Options
from tests.chaos.world import ChaosDaemon, chaos_daemon
from tests.daemon import child_environment

NAME = "stop"
ALIVE, CUT = "its session lives", "its session is over"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int = 1
    stopped_s: float = 12.0  # every timeout of kvd's that a session can meet is shorter
    workers: int = 3
    num_pages: int = 110  # the crowd wants more than are left


def play(report: Report, plan: Plan) -> None:
    for number, case in enumerate((ALIVE, CUT)):
        report.say(f"a worker stopped for {plan.stopped_s:.0f} s; {case}")
        with tempfile.TemporaryDirectory() as directory, nursery() as children:
            folder = Path(directory)
            with chaos_daemon(folder, num_pages=plan.num_pages) as daemon:
                universe = Universe(plan.seed, documents=40, suffixes=6)
                options = Options(socket_dir=str(daemon.socket_dir), folder=str(folder), name="",
                                  seed=plan.seed + number, universe=universe)  # fmt: skip
                _case(report, plan, case, daemon, Crowd(children, options, plan.workers))


def _case(report: Report, plan: Plan, case: str, daemon: ChaosDaemon, crowd: Crowd) -> None:
    with (
        daemon.attach("watching", "admin") as admin,
        holdout(daemon, plan.seed, case == CUT) as process,
    ):
        watch = Watch(admin)
        taken = line(process)
        refs = taken["reads"] + taken["writes"]
        crowd.fill()
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        before = uses(admin, refs)
        completed, done_s = crowd.counters()["requests"], time.monotonic()
        reused = seen_no_pages = 0
        while time.monotonic() < done_s + plan.stopped_s:
            time.sleep(0.1)
            reused += uses(admin, refs) != before
            watch.sums()
            crowd.fill()
        counters = crowd.counters()
        seen_no_pages = counters["no_pages"]
        others = (counters["requests"] - completed) / plan.stopped_s
        said = go_on(process)
        watch.audit()
        crowd.end()
        process.kill()
        killed_s = time.monotonic()
        back_s = watch.until_gone("holdout") - killed_s
        watch.all_given_back()
    daemon.check()
    late = set(said["late"].values())
    wanted = {"OK", "NO_PAGES"} if case == ALIVE else {"SESSION_ENDED", "DAEMON_UNREACHABLE"}
    rows = {
        "pages of it reused": (reused, 0),
        "what it read was overwritten": (int(not said["read_right"]), 0),
        "what it wrote was overwritten": (int(not said["own_right"]), 0),
        "late requests answered otherwise than they must be": (len(late - wanted), 0),
        "violations seen by the others": (len(crowd.violations()), 0),
        "overlaps in their histories": (crowd.check_histories().count, 0),
    }
    for what, (value, target) in rows.items():
        report.add(Row(name=f"{case}: {what}", value=value, target=target, unit=""))
    report.add(Row(name=f"{case}: requests of the others", value=round(others, 1), unit="/s",
                   target=1, higher_is_better=True,
                   details={"said": said, "refused_pages": seen_no_pages}))  # fmt: skip
    report.add(Row(name=f"{case}: times that others were refused pages", value=seen_no_pages,
                   unit="", target=1, higher_is_better=True))  # fmt: skip
    report.add(Row(name=f"{case}: pages back after its death", value=round(back_s * 1e3, 1),
                   unit="ms", target=1000))  # fmt: skip


def uses(admin: KvdClient, refs: list[int]) -> list[Any]:
    """Generation and holders of each page, but for those that come and go."""
    return [
        (found["generation"], any(h["name"] == "holdout" for h in found["holders"]))
        for found in (admin.call(verbs.who_holds(ref & 0xFFFF_FFFF)) for ref in refs)
    ]


@contextmanager
def holdout(daemon: ChaosDaemon, seed: int, cut: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    how = "cut" if cut else "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.holdout", str(daemon.socket_dir), str(seed), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def go_on(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a stopped holdout says at its end."""
    process.send_signal(signal.SIGCONT)
    assert process.stdin is not None
    process.stdin.write(b"go on\n")
    process.stdin.flush()
    return line(process)


def line(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the holdout has ended: see its traceback above")
    found: dict[str, Any] = json.loads(line)
    return found
