"""Timing on a machine that is never quiet.

Where a neighbour takes the core away, wall time shows it and CPU time does not; where an operation
is so short that reading the CPU clock (a system call) is a part of it, CPU time is too long and
wall time is not. So p50 is the lesser of both medians, and the same for p99. Samples are taken in
batches, with the baseline's batches between them; the figure is the best batch's median, because
noise only ever adds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from time import perf_counter_ns, thread_time_ns
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds. `spread` is how far the worst batch's median is above the best one's, as a
    fraction of it."""

    p50_us: float
    p99_us: float
    spread: float
    num_samples: int

    def to_json(self) -> dict[str, Any]:
        return {
            "p50_us": round(self.p50_us, 3),
            "p99_us": round(self.p99_us, 3),
            "spread": round(self.spread, 3),
            "num_samples": self.num_samples,
        }


class Stopwatch:
    """Samples of one operation, in batches.

    Invariant: wall and CPU times are in pairs, in the order taken; `starts` are where batches
    begin.
    """

    def __init__(self, *, waits: bool = False) -> None:
        """`waits`: the operation waits for another process, so this thread's CPU time says
        nothing and wall time alone counts."""
        self._waits = waits
        self._wall: list[int] = []
        self._cpu: list[int] = []
        self._starts: list[int] = []

    def batch(self) -> None:
        """What follows is another batch."""
        if not self._starts or self._starts[-1] != len(self._wall):
            self._starts.append(len(self._wall))

    def time(self, what: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it, and take one sample."""
        cpu = thread_time_ns()
        wall = perf_counter_ns()
        result = what(*args, **kwargs)
        wall = perf_counter_ns() - wall
        self._cpu.append(thread_time_ns() - cpu)
        self._wall.append(wall)
        return result

    def walls(self) -> list[float]:
        """The median wall time of each batch, in microseconds."""
        wall_ns, _ = _own_cost()
        batches = _batches(self._wall, self._starts)
        return [(statistics.median(batch) - wall_ns) / 1e3 for batch in batches if batch]

    def timing(self) -> Timing:
        """The samples' figures, without what the stopwatch itself takes."""
        wall_ns, cpu_ns = _own_cost()
        wall = _batches([t - wall_ns for t in self._wall], self._starts)
        if self._waits:
            return timing_of(wall, wall)
        return timing_of(wall, _batches([t - cpu_ns for t in self._cpu], self._starts))


def timing_of(wall: Sequence[Sequence[float]], cpu: Sequence[Sequence[float]]) -> Timing:
    """From batches of nanoseconds; an empty batch counts for nothing."""
    medians = [
        min(statistics.median(w), statistics.median(c)) for w, c in zip(wall, cpu, strict=True) if w
    ]
    all_wall = [t for batch in wall for t in batch]
    all_cpu = [t for batch in cpu for t in batch]
    best = max(min(medians), 1.0)
    p99 = min(quantile(all_wall, 0.99), quantile(all_cpu, 0.99))
    return Timing(best / 1e3, p99 / 1e3, max(medians) / best - 1, len(all_wall))


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a fraction `q` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1)]


@cache
def _own_cost() -> tuple[int, int]:
    """Nanoseconds that the stopwatch shows for nothing, wall and CPU: the least of many medians."""
    medians = []
    for _ in range(20):
        watch = Stopwatch()
        for _ in range(500):
            watch.time(_nothing)
        medians.append((statistics.median(watch._wall), statistics.median(watch._cpu)))
    return int(min(wall for wall, _ in medians)), int(min(cpu for _, cpu in medians))


def _nothing() -> None:
    return None


def _batches(values: list[int], starts: list[int]) -> list[list[int]]:
    bounds = [0, *starts, len(values)]
    return [values[a:b] for a, b in pairwise(bounds)]
