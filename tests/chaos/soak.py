"""Mixed load and eviction for long, with blows of all kinds: every sum equal at every audit, files
and memory flat.

A run is made of rounds. At the end of each the workers' accounts are compared with kvd's, all give
back what they have, and their histories are checked and thrown away; the cache lives on.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvd_shared import verbs
from tests.benchmarks.harness import Report, Row
from tests.chaos.content import Universe
from tests.chaos.crowd import Crowd
from tests.chaos.nursery import Nursery, nursery
from tests.chaos.watch import Broken, Watch, process_use, until_fds
from tests.chaos.work import Options
from tests.chaos.world import ChaosDaemon, chaos_daemon

NAME = "soak"
AUDIT_EVERY_S = 5.0
FEWEST_ROUNDS = 6  # from which a growth of memory can be told
SHORTEST_S, LONGEST_S = 0.2, 4.0  # of a stop
GRACE_S = 2.0  # for sessions to resume: some stops are longer
KILLS = ("kill", "kill", "kill the daemon")
OTHERS = ("stop", "cut", "stop the daemon", "flush")
ACROSS = "stop across a kill of the daemon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int = 1
    seconds: float = 1800.0
    blows_a_minute: float = 6.0  # half of them kills: three a minute
    round_s: float = 60.0
    workers: int = 6
    num_pages: int = 600  # less than the workers want at times
    daemon_kills: bool = True  # a third of the kills, under a keeper


def play(report: Report, plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as directory, nursery() as children:
        folder = Path(directory)
        with chaos_daemon(
            folder,
            num_pages=plan.num_pages,
            keeper=plan.daemon_kills,
            daemon_settings=f"resume_grace_s = {GRACE_S}\n",
        ) as daemon:
            _Run(report, plan, folder, daemon, children).play()


class _Run:
    def __init__(
        self, report: Report, plan: Plan, folder: Path, daemon: ChaosDaemon, children: Nursery
    ) -> None:
        self._report, self._plan, self._folder = report, plan, folder
        self._daemon, self._children = daemon, children
        self._rng = random.Random(plan.seed)
        self._blows: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._use: list[dict[str, int]] = []
        self._wrong: list[str] = []
        self._audits = self._held = 0

    def play(self) -> None:
        end_s = time.monotonic() + self._plan.seconds
        number = 0
        while time.monotonic() < end_s:
            number += 1
            self._round(number, min(end_s, time.monotonic() + self._plan.round_s))
            done = self._totals
            self._report.say(
                f"round {number}: {done['requests']:,} requests, {done['pages_verified']:,} pages "
                f"verified, {sum(self._blows.values())} blows, {len(self._wrong)} wrong; "
                f"{self._use[-1]['rss_bytes'] / 2**20:.1f} MiB, {self._use[-1]['fds']} fds"
            )
        with self._daemon.attach("watching", "admin") as admin:
            Watch(admin).all_given_back()
        self._daemon.check()
        self._rows()

    def _round(self, number: int, end_s: float) -> None:
        folder = self._folder / f"round-{number}"
        folder.mkdir()
        universe = Universe(self._plan.seed + number // 4, documents=60, suffixes=6)
        options = Options(socket_dir=str(self._daemon.socket_dir), folder=str(folder), name="",
                          seed=self._plan.seed * 1009 + number, universe=universe)  # fmt: skip
        # now and then a load that wants far more than there is
        options = replace(
            options,
            sequences=self._rng.choice([4, 6, 24]),
            daemon_stays=not self._plan.daemon_kills,
        )
        crowd = Crowd(self._children, options, self._plan.workers)
        self._attach()
        crowd.fill()
        self._blows_until(end_s, crowd)
        self._held += crowd.check_holds(self._watch)
        crowd.end()
        self._until_given_back(self._watch)
        self._detach()
        pid = self._daemon.served_by
        first = self._use[0] if self._use else process_use(pid)
        self._use.append(until_fds(pid, first["fds"]))
        self._totals += Counter(crowd.counters())
        self._wrong += [str(v) for v in crowd.violations()] + crowd.check_histories().told
        shutil.rmtree(folder)

    def _attach(self) -> None:
        self._admin = self._daemon.attach("watching", "admin")
        self._watch = Watch(self._admin)

    def _detach(self) -> None:
        self._audits += self._watch.audits
        self._admin.close()

    def _blows_until(self, end_s: float, crowd: Crowd) -> None:
        audit_s = time.monotonic() + AUDIT_EVERY_S
        blow_s = self._next_blow()
        while (now := time.monotonic()) < end_s:
            time.sleep(max(0.0, min(audit_s, blow_s, end_s) - now))
            if time.monotonic() >= audit_s:
                self._watch.sums()
                self._watch.audit()
                crowd.fill()
                audit_s += AUDIT_EVERY_S
            if time.monotonic() >= blow_s:
                self._strike(crowd)
                crowd.fill()
                self._watch.sums()
                self._watch.audit()
                blow_s = self._next_blow()

    def _next_blow(self) -> float:
        return time.monotonic() + self._rng.expovariate(self._plan.blows_a_minute / 60)

    def _strike(self, crowd: Crowd) -> None:
        blow = self._rng.choice(KILLS if self._rng.random() < 0.5 else OTHERS)
        if blow == "kill the daemon" and not self._plan.daemon_kills:
            blow = "kill"
        if blow == "kill the daemon" and self._rng.random() < 0.3:
            blow = ACROSS
        self._blows[blow] += 1
        victim = crowd.pick(self._rng)
        match blow:
            case "kill":
                crowd.kill(victim)
                self._watch.until_gone(victim.name)
            case "stop":
                victim.signal(signal.SIGSTOP)
                self._pause()
                victim.signal(signal.SIGCONT)
            case "cut":
                crowd.cut(victim)
            case "flush":
                self._admin.call(verbs.flush(salt=self._rng.choice([b"", b"one"])))
            case "stop the daemon":
                os.kill(self._daemon.served_by, signal.SIGSTOP)
                self._pause()
                os.kill(self._daemon.served_by, signal.SIGCONT)
            case "kill the daemon":
                self._kill_daemon()
            case _:
                victim.signal(signal.SIGSTOP)
                self._kill_daemon()
                self._pause()
                victim.signal(signal.SIGCONT)

    def _kill_daemon(self) -> None:
        os.kill(self._daemon.served_by, signal.SIGKILL)
        self._daemon.until_ready()
        self._detach()  # what it had died with the daemon
        self._attach()

    def _pause(self) -> None:
        time.sleep(self._rng.uniform(SHORTEST_S, LONGEST_S))

    def _until_given_back(self, watch: Watch) -> None:
        deadline = time.monotonic() + 20.0
        while True:
            counts = watch.sums()
            if counts["free"] + counts["cached"] == self._plan.num_pages:
                return
            if time.monotonic() > deadline:
                raise Broken(f"nobody is attached, and yet: {counts}")
            time.sleep(0.05)

    def _rows(self) -> None:
        add, use = self._report.add, self._use
        self._report.extra |= {"blows": dict(self._blows), "counters": dict(self._totals),
                               "wrong": self._wrong[:50], "use": use}  # fmt: skip
        add(Row(name="blows a minute, as asked for", value=self._plan.blows_a_minute, unit=""))
        for blow, times in sorted(self._blows.items()):
            add(Row(name=f"blow: {blow}", value=times, unit=""))
        add(Row(name="requests completed", value=self._totals["requests"], unit=""))
        add(Row(name="pages verified", value=self._totals["pages_verified"], unit=""))
        add(Row(name="times that pages were refused", value=self._totals["no_pages"], unit=""))
        add(Row(name="sessions resumed", value=self._totals["resumed"], unit=""))
        add(
            Row(
                name="fences seen by workers, those of cut ones too",
                value=self._totals["fenced"],
                unit="",
            )
        )
        add(Row(name="yielded", value=self._totals["yielded"], unit=""))
        add(Row(name="audits", value=self._audits, unit=""))
        add(Row(name="pages compared with kvd's holds", value=self._held, unit=""))
        add(Row(name="violations and overlaps", value=len(self._wrong), unit="", target=0))
        add(Row(name="fds of the daemon, more than after the first round", unit="", target=0,
                value=use[-1]["fds"] - use[0]["fds"]))  # fmt: skip
        later = [one["rss_bytes"] for one in use[len(use) // 4 :]]
        if (
            len(later) >= FEWEST_ROUNDS
        ):  # the straight line through the last three quarters of the rounds
            slope = float(np.polyfit(np.arange(len(later)), later, 1)[0]) * 60
            add(Row(name="memory of the daemon, growth in 60 rounds", unit="MiB",
                    value=round(slope / 2**20, 2), target=8))  # fmt: skip
