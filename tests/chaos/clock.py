"""A wall clock that jumps by days, back and forth: nothing that kvd decides may hang on it.

The daemon's Python sees, through everything by which Python can ask for the time of day, a clock
that is set anew every fraction of a second; the real one is the machine's and stays as it is.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.harness import Report, Row
from tests.chaos.content import Universe
from tests.chaos.crowd import Crowd
from tests.chaos.nursery import nursery
from tests.chaos.watch import Watch
from tests.chaos.work import Options
from tests.chaos.world import chaos_daemon

NAME = "clock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int = 1
    seconds: float = 20.0
    workers: int = 3
    num_pages: int = 300


def play(report: Report, plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as directory, nursery() as children:
        folder = Path(directory)
        program = ("-m", "tests.chaos.jumping", str(folder / "jumps"))
        # a time-to-live: an expiry by the wall clock would end it at once, or never
        settings = "ttl_s = 600.0\n"
        with chaos_daemon(folder, num_pages=plan.num_pages, program=program,
                          pool_settings=settings) as daemon:  # fmt: skip
            options = Options(socket_dir=str(daemon.socket_dir), folder=str(folder), name="",
                              seed=plan.seed, universe=Universe(plan.seed))  # fmt: skip
            crowd = Crowd(children, options, plan.workers)
            with daemon.attach("watching", "admin") as admin:
                watch = Watch(admin)
                crowd.fill()
                end_s = time.monotonic() + plan.seconds
                while time.monotonic() < end_s:
                    time.sleep(0.5)
                    watch.sums()
                    watch.audit()
                    crowd.fill()
                pool, uptime_s = watch.pool(), watch.status()["uptime_s"]
                crowd.check_holds(watch)
                crowd.end()
                watch.all_given_back()
            daemon.check()
        jumps = len((folder / "jumps").read_text().splitlines())
        add = report.add
        add(Row(name="readings of the wall clock that had jumped", value=jumps, unit=""))
        add(Row(name="uptime is off by", value=round(abs(uptime_s - plan.seconds), 1), unit="s",
                target=10))  # fmt: skip
        add(Row(name="pages expired before their time", value=pool["left_pages"]["expired"],
                unit="", target=0))  # fmt: skip
        add(Row(name="requests completed", value=crowd.counters()["requests"], unit="",
                target=1, higher_is_better=True))  # fmt: skip
        add(Row(name="violations seen by workers", value=len(crowd.violations()), unit="",
                target=0))  # fmt: skip
        add(Row(name="overlaps in the histories", value=crowd.check_histories().count, unit="",
                target=0))  # fmt: skip
