"""The longest turn of a daemon's loop at a million pages: under load, and while somebody asks for
what looks at every page or gives back a great many.

A virtual machine's CPU time goes on while its host runs somebody else, so the longest of some
thousand turns is often one in which nothing was done. All of it is played PLAYS times over, with a
new daemon each time, and the least counts: a turn that is long for what it does is long each time.
The longest of every play are in the details.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.client import KvdClient
from kvd_shared.namespace import Namespace
from tests.benchmarks.decoding import Decoding
from tests.benchmarks.harness import Report, Row
from tests.benchmarks.served import documents, fill, served, store
from tests.benchmarks.timed_daemon import SHORTEST_MS
from tests.benchmarks.workload import DOCUMENT_PAGES, NAMESPACE, PAGE_SIZE, Tokens
from tests.daemon import RunningDaemon, child_environment, eventually

POOL = 1_000_000  # pages
TARGET_MS, AIM_MS = 2.0, 1.0
MANY_PAGES = 200_000  # that are flushed, expire, or are held by one session, at once
FLUSHED = Namespace(model="flushed")
OLD = Namespace(model="old weights", weights_version=1)
EXPIRING = Namespace(model="expiring")
TTL_S = 4.0
LONG = 131_072  # tokens of the longest prompt
AFTERWARDS_S = 1.0  # what an operation leaves to be done may take many turns
HELD_A_STEP = 16  # documents
SEQUENCES, ROUNDS = 256, 200  # of the load
PLAYS = 4


Longest = list[tuple[float, str]]


class Load(threading.Thread):
    """A worker that never rests: decode steps of 256 sequences, new prompts of 8k tokens, which
    evict, and matches of a cached prompt of 128k."""

    def __init__(self, client: KvdClient) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self.error: Exception | None = None
        self._client = client
        self._tokens = Tokens(11)
        self._long = np.frombuffer(self._tokens.take(LONG), dtype="<i4")
        self._stopped = threading.Event()
        store(client, [self._long.tobytes()])

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._some_rounds()
        except Exception as e:
            self.error = e

    def stop(self) -> None:
        """Raises what went wrong, if something did."""
        self._stopped.set()
        self.join()
        if self.error is not None:
            raise self.error

    def _some_rounds(self) -> None:
        call = self._client.call
        decoding = Decoding(self._client, SEQUENCES, seed=self.rounds)
        for _ in range(ROUNDS):
            decoding.step()
            store(self._client, [self._tokens.take(8192)])
            call(verbs.free(call(verbs.match(NAMESPACE, self._long)).refs))
            self.rounds += 1
        decoding.close()


def turns(report: Report) -> None:
    """Rows: the longest turn in each phase, in CPU time of the loop's thread."""
    seen: dict[str, list[Longest]] = {}
    for play in range(PLAYS):
        report.say(f"a daemon with timed turns and {POOL:,} pages, {play + 1} of {PLAYS}")
        for name, longest in _played(report).items():
            seen.setdefault(name, []).append(longest)
    for name, plays in seen.items():
        report.add(_row(name, plays))


def _played(report: Report) -> dict[str, Longest]:
    with tempfile.TemporaryDirectory() as directory, _timed(Path(directory)) as (daemon, out):
        with daemon.attach("filling") as filling:
            fill(filling, POOL - 3 * MANY_PAGES, seed=3)
            fill(filling, MANY_PAGES, seed=4, namespace=FLUSHED)
            fill(filling, MANY_PAGES, seed=5, namespace=OLD)
            fill(filling, MANY_PAGES - 2 * LONG // PAGE_SIZE, seed=6)
        phases = Phases(report)
        with daemon.attach("load") as client, daemon.attach("admin", "admin") as admin:
            load = Load(client)
            load.start()
            _play(phases, daemon, admin)
            load.stop()
        report.say(f"{load.rounds} rounds of load")
        daemon.check()
        return phases.longest(out)


def _play(phases: Phases, daemon: RunningDaemon, admin: KvdClient) -> None:
    def ask(call: Call[Any], times: int = 1) -> None:
        for _ in range(times):
            admin.call(call, timeout_s=60.0)

    some = np.frombuffer(next(documents(6, 1)), dtype="<i4")
    with phases.phase("load alone"):
        time.sleep(3.0)
    with phases.phase("status"):
        ask(verbs.status(), 20)
    with phases.phase("pages"):
        ask(verbs.pages(), 5)
    with phases.phase("tree of 1000 nodes"):
        ask(verbs.tree(max_nodes=1000), 5)
    with phases.phase("sessions"):
        ask(verbs.sessions(), 10)
    with phases.phase("explain, who holds"):
        ask(verbs.explain(NAMESPACE, some), 10)
        ask(verbs.who_holds(7), 10)
    with phases.phase("audit"):
        ask(verbs.audit())
    with phases.phase("evict 20,000 pages"):
        ask(verbs.evict(20_000))
    with phases.phase(f"flush of {MANY_PAGES // 1000}k pages"):
        ask(verbs.flush(model=FLUSHED.model))
    with phases.phase(f"weights version raised, {MANY_PAGES // 1000}k pages"):
        ask(verbs.raise_weights_version(2, OLD.model))
    with daemon.attach("expiring") as client:
        fill(client, MANY_PAGES, 8, EXPIRING, verbs.Retention(ttl_s=TTL_S))
    with phases.phase(f"{MANY_PAGES // 1000}k pages expire"):
        time.sleep(TTL_S)
    with daemon.attach("long prompts") as client, phases.phase(f"cold prompts of {LONG} tokens"):
        tokens = Tokens(9)
        for _ in range(10):
            store(client, [tokens.take(LONG)])
    holder = _holder(daemon)
    with phases.phase(f"a session that holds {MANY_PAGES // 1000}k pages ends"):
        holder.close()


def _holder(daemon: RunningDaemon) -> KvdClient:
    """A session that holds a great many pages, in many nodes."""
    client = daemon.attach("holder")
    every = documents(10, MANY_PAGES // DOCUMENT_PAGES)
    while some := [np.frombuffer(d, dtype="<i4") for d in islice(every, HELD_A_STEP)]:
        client.call(verbs.step([verbs.open_sequence(NAMESPACE, tokens) for tokens in some]))
    return client


class Phases:
    """What was done from when to when. Times are CLOCK_MONOTONIC, of all processes."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._times: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._report.say(f"longest turn: {name}")
        start = time.monotonic()
        yield
        time.sleep(AFTERWARDS_S)
        self._times[name] = start, time.monotonic()

    def longest(self, out: Path) -> dict[str, Longest]:
        """From the file that the daemon wrote (see timed_daemon.py): by phase, its turns of more
        than SHORTEST_MS, the longest first."""
        lines = [line.split() for line in out.read_text().splitlines()]
        seen = [(float(at), float(ms), ops) for at, ms, ops in lines]
        return {
            name: sorted(((ms, ops) for at, ms, ops in seen if start <= at <= end), reverse=True)
            for name, (start, end) in self._times.items()
        }


def _row(name: str, plays: list[Longest]) -> Row:
    longest = [turns[0][0] if turns else SHORTEST_MS for turns in plays]
    return Row(
        name=f"longest turn at 1M pages: {name}",
        value=round(min(longest), 3),
        unit="ms",
        target=TARGET_MS,
        aim=AIM_MS,
        details={
            "pages": POOL,
            "tokens": None,
            "baseline": None,
            "ratio": None,
            "longest_of_each_play_ms": longest,
            "longest": [turns[:4] for turns in plays],  # ms, and the requests taken up in that turn
            "turns": [len(turns) for turns in plays],  # of more than SHORTEST_MS
            "turns_over_target": [sum(ms > TARGET_MS for ms, _ in turns) for turns in plays],
        },
    )


@contextmanager
def _timed(directory: Path) -> Iterator[tuple[RunningDaemon, Path]]:
    """A daemon whose loop notes its long turns in the file given back beside it."""
    out = directory / "turns"
    with served(directory, POOL) as daemon:
        daemon.stop()
        with daemon.log_file.open("ab") as log:
            daemon.process = subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.timed_daemon", daemon.config, out],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        pid = daemon.process.pid
        eventually(lambda: pid in {e["pid"] for e in daemon.logs("daemon.ready")}, timeout_s=30.0)
        yield daemon, out
