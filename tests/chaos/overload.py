"""Clients without consideration: nobody waits for them, and the daemon's memory stays small."""

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

import numpy as np

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from tests.benchmarks.harness import Report, Row
from tests.chaos.content import NAMESPACES
from tests.chaos.watch import Broken, Watch, process_use
from tests.chaos.world import ChaosDaemon, chaos_daemon
from tests.daemon import child_environment

NAME = "overload"
MODES = ("flood", "heavy", "huge", "deaf", "garbage", "idle")
# Others' p99, by wall time. On a machine that is busy with other things, too, it is what they wait
# undisturbed that counts, so many times.
MOST_WAIT_MS, MOST_TIMES = 50.0, 10.0
MOST_MIB = 64.0  # more than before, while it goes on
MOST_GARBAGE = 10_000  # senseless messages that are still answered one by one
PAUSE_S = 0.002  # between two requests of the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int = 1
    seconds: float = 10.0  # of each
    num_pages: int = 65_536
    modes: tuple[str, ...] = MODES


def play(report: Report, plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for mode in plan.modes:  # each meets a daemon of its own: memory is compared
            with chaos_daemon(Path(directory), num_pages=plan.num_pages) as daemon:
                _mode(report, plan, mode, daemon)


def _mode(report: Report, plan: Plan, mode: str, daemon: ChaosDaemon) -> None:
    report.say(f"overload: {mode}")
    with (
        daemon.attach("other") as other,
        daemon.attach("watching", "admin") as admin,
    ):
        quiet = _waits_ms(other, plan.seconds / 3)
        before = process_use(daemon.served_by)
        with _flooder(mode, daemon) as process:
            loud = _waits_ms(other, plan.seconds)
            attach_ms = _attach_ms(daemon)
            during = process_use(daemon.served_by)
            said = _end(process)
        watch = Watch(admin)
        watch.until_gone("flooder")
        watch.audit()
    daemon.check()
    grown = (during["rss_bytes"] - before["rss_bytes"]) / 2**20
    add = report.add
    add(Row(name=f"{mode}: others wait, p99", value=round(loud, 2), unit="ms",
            target=max(MOST_WAIT_MS, round(MOST_TIMES * quiet, 1)),
            details={"undisturbed_ms": quiet, "flooder": said}))  # fmt: skip
    add(Row(name=f"{mode}: attaching takes, most of 5", value=round(attach_ms, 1), unit="ms",
            target=2000))  # fmt: skip
    add(Row(name=f"{mode}: memory of the daemon, more than before", value=round(grown, 1),
            unit="MiB", target=MOST_MIB))  # fmt: skip
    if mode == "garbage":
        add(Row(name="garbage: messages answered before it is disconnected",
                value=said.get("answered", 0), unit="", target=MOST_GARBAGE))  # fmt: skip


def _waits_ms(client: KvdClient, seconds: float) -> float:
    """p99 of round trips of a small request, wall time."""
    waits = []
    end_s = time.monotonic() + seconds
    while (start := time.perf_counter()) and time.monotonic() < end_s:
        client.call(verbs.probe(NAMESPACES[0], [1, 2, 3]), timeout_s=30.0)
        waits.append(time.perf_counter() - start)
        time.sleep(PAUSE_S)
    return float(np.quantile(waits, 0.99)) * 1e3


def _attach_ms(daemon: ChaosDaemon) -> float:
    worst = 0.0
    for _ in range(5):
        start = time.perf_counter()
        daemon.attach("new", timeout_s=20.0).close()
        worst = max(worst, time.perf_counter() - start)
    return worst * 1e3


@contextmanager
def _flooder(mode: str, daemon: ChaosDaemon) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.flooder", mode, str(daemon.socket_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise Broken(f"the flooder of mode {mode} has ended")
        yield process
    finally:
        process.kill()
        process.wait()


def _end(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """It says what it did; one that cannot say it any more (it was cut off) is killed."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        out = process.stdout.read() if process.wait(15.0) == 0 else b""
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        out = b""
    found: dict[str, Any] = json.loads(out.splitlines()[-1]) if out else {}
    return found
