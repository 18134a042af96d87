"""Round trips to a daemon process over ZeroMQ, over a bare echo of as many bytes.

Both are called in turn, a few dozen times each, from one thread of this process. What is timed is
what a caller of the client library waits for: encoding, both ways, the daemon, decoding.

A round trip takes two processes, and wall time is long where a neighbour wants their cores. So a
row with a budget is taken twice, by wall time and by the CPU time of both processes (of a ratio,
both sides alike), and the lesser counts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.client import KvdClient
from kvd_shared.layout import pages_needed
from kvd_shared.refs import REF_BYTES
from kvd_shared.rpc import RpcCodec
from tests.benchmarks.bare_echo import BareEcho, bare_echo
from tests.benchmarks.chat import Turn, turns
from tests.benchmarks.decoding import Decoding
from tests.benchmarks.harness import Report, Row
from tests.benchmarks.served import cpu_ns, fill, served, store
from tests.benchmarks.timing import Stopwatch
from tests.benchmarks.workload import NAMESPACE, PAGE_SIZE, Tokens

POOL = 1_000_000  # pages
PING_LIMITS = (1.3, 1.15)  # over the echo: target, aim
MATCH_LIMITS: dict[int, tuple[float | None, float | None]] = {
    1024: (None, None),
    8192: (None, None),
    32768: (1.6, 1.3),
    131072: (None, None),
}
STEPS: dict[int, tuple[float | None, float | None]] = {  # sequences: us a sequence, target and aim
    16: (None, None),
    64: (None, None),
    256: (3.0, 2.0),
}
CALL_BATCHES, ROUNDS = 300, 10  # many and short, over seconds: some of them meet no neighbour
BATCHES = 50  # of chat turns and of steps
CHAT_TURNS = 2000


class Caller:
    """Times calls of one daemon and the echo in turn."""

    def __init__(self, report: Report, client: KvdClient, echo: BareEcho, pid: int) -> None:
        self.report, self.client, self.echo, self.pid = report, client, echo, pid

    def compare(
        self,
        name: str,
        call: Call[Any],
        tokens: int | None,
        limits: tuple[float | None, float | None],
        undo: Callable[[Any], Call[Any] | None] = lambda result: None,
    ) -> None:
        """A row: the call's round trip over the echo's. `undo` takes back what it did, untimed."""
        asked, echoed = Stopwatch(waits=True), Stopwatch(waits=True)
        asked_cpu, echoed_cpu = [], []  # us a round trip, both processes, the way back included
        back = undo(self.client.call(call))
        self._alike(0, call, tokens)
        if back is not None:
            self._alike(1, back, None)
            self.client.call(back)
        for _ in range(CALL_BATCHES):
            asked.batch()
            start = self._cpu_us(self.pid)
            for _ in range(ROUNDS):
                back = undo(asked.time(self.client.call, call))
                if back is not None:
                    self.client.call(back)
            asked_cpu.append((self._cpu_us(self.pid) - start) / ROUNDS)
            echoed.batch()
            start = self._cpu_us(self.echo.pid)
            for _ in range(ROUNDS):
                echoed.time(self.echo.round_trip)
                if back is not None:
                    self.echo.round_trip(1)
            echoed_cpu.append((self._cpu_us(self.echo.pid) - start) / ROUNDS)
        timing, baseline = asked.timing(), echoed.timing()
        by_wall = _paired(asked.walls(), echoed.walls())
        by_cpu = _paired(asked_cpu, echoed_cpu)
        self.report.add(
            Row(
                name=f"{name}: over a bare echo",
                value=round(min(by_wall, by_cpu), 3),
                unit="x",
                target=limits[0],
                aim=limits[1],
                details={
                    "pages": POOL,
                    "tokens": tokens,
                    **timing.to_json(),
                    "baseline": "DEALER/ROUTER echo of the same sizes",
                    "baseline_us": round(baseline.p50_us, 3),
                    "ratio": round(min(by_wall, by_cpu), 3),
                    "ratio_by_wall_time": round(by_wall, 3),
                    "ratio_by_cpu_time": round(by_cpu, 3),
                    "ratio_of_best_batches": round(timing.p50_us / baseline.p50_us, 3),
                    "cpu_us": round(min(asked_cpu), 2),
                    "baseline_cpu_us": round(min(echoed_cpu), 2),
                },
            )
        )

    def _alike(self, number: int, call: Call[Any], tokens: int | None) -> None:
        """Let the echo's round trip have the sizes of this call's."""
        request = RpcCodec(bytes(16)).request(call)[1]
        refs = [bytes(tokens // PAGE_SIZE * REF_BYTES)] if tokens else []
        self.echo.like(number, request, [bytes(64), *refs])

    def _cpu_us(self, pid: int) -> float:
        """CPU time of this process and another one until now."""
        return (time.process_time_ns() + cpu_ns(pid)) / 1e3

    def chat(self) -> None:
        """A row: a turn of the chat workload in two round trips: acquire, then publish and free."""
        watch = Stopwatch(waits=True)
        every = list(turns())
        for start in range(0, CHAT_TURNS, CHAT_TURNS // BATCHES):
            watch.batch()
            for turn in every[start : start + CHAT_TURNS // BATCHES]:
                watch.time(self._chat_turn, turn)
        timing = watch.timing()
        self.report.add(
            Row(
                name="chat turn over ZeroMQ, two round trips",
                value=round(timing.p50_us, 1),
                unit="us",
                details={
                    "pages": POOL,
                    "tokens": None,
                    **timing.to_json(),
                    "baseline": None,
                    "ratio": None,
                },
            )
        )

    def _chat_turn(self, turn: Turn) -> None:
        prompt, whole = (np.frombuffer(raw, dtype="<i4") for raw in (turn.prompt, turn.whole))
        count, full = pages_needed(len(whole), PAGE_SIZE), len(whole) // PAGE_SIZE
        held = self.client.call(verbs.acquire(NAMESPACE, prompt, count))
        known = held.num_matched_pages
        after = int(held.refs[known - 1]) if known else None
        new = whole[known * PAGE_SIZE : full * PAGE_SIZE]
        publish = verbs.publish(NAMESPACE, new, held.refs[known:full], after)
        for result in self.client.call(verbs.step([publish, verbs.free(held.refs)])):
            if isinstance(result, Exception):
                raise result

    def step(self, sequences: int, limits: tuple[float | None, float | None]) -> None:
        """Rows: one round trip for a decode step of that many sequences, by sequences."""
        decoding = Decoding(self.client, sequences)
        usual, full = Stopwatch(waits=True), Stopwatch(waits=True)
        cpu = []  # us a step, both processes
        for _ in range(BATCHES):
            usual.batch()
            start = self._cpu_us(self.pid)
            for _ in range(PAGE_SIZE):
                decoding.step(usual)
            cpu.append((self._cpu_us(self.pid) - start) / PAGE_SIZE)
        decoding.close()
        decoding = Decoding(self.client, sequences)
        for _ in range(BATCHES):
            full.batch()
            decoding.align()
            decoding.step(full)
        decoding.close()
        timing = usual.timing()
        details = {"pages": POOL, "tokens": sequences, "baseline": None, "ratio": None}
        self.report.add(
            Row(
                name=f"one RPC for a step of {sequences} sequences: a sequence",
                value=round(min(timing.p50_us, min(cpu)) / sequences, 3),
                unit="us",
                target=limits[0],
                aim=limits[1],
                details={**details, **timing.to_json(), "cpu_us": round(min(cpu), 2)},
            )
        )
        timing = full.timing()
        self.report.add(
            Row(
                name=f"one RPC for {sequences} sequences that all fill a page: a sequence",
                value=round(timing.p50_us / sequences, 3),
                unit="us",
                details={**details, **timing.to_json()},
            )
        )


def _paired(ours: list[float], baseline: list[float]) -> float:
    """The median ratio of neighbouring batches. The best batch of each could have met quite
    different neighbours."""
    return statistics.median(a / b for a, b in zip(ours, baseline, strict=True))


def rpcs(report: Report) -> None:
    report.say(f"a daemon with {POOL:,} pages, filled over ZeroMQ")
    with (
        tempfile.TemporaryDirectory() as directory,
        served(Path(directory), POOL) as daemon,
        daemon.attach("benchmark") as client,
        bare_echo() as echo,
    ):
        fill(client, POOL - 20_000, seed=3)
        caller = Caller(report, client, echo, daemon.process.pid)
        report.say("ping")
        caller.compare("RPC ping", verbs.free([]), None, PING_LIMITS)
        for n, limits in MATCH_LIMITS.items():
            report.say(f"match of {n} tokens over ZeroMQ")
            document = Tokens(n).take(n)
            store(client, [document])
            prompt = np.append(np.frombuffer(document, dtype="<i4"), 1)
            caller.compare(
                f"RPC match, warm, {n // 1024}k tokens",
                verbs.match(NAMESPACE, prompt),
                n,
                limits,
                undo=lambda found: verbs.free(found.refs),
            )
        report.say("chat turns over ZeroMQ")
        caller.chat()
        for sequences, limits in STEPS.items():
            report.say(f"a step of {sequences} sequences")
            caller.step(sequences, limits)
        daemon.check()
