"""The daemon's service times of a run, by phase (what tests.chaos.timed has written)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]


class Phases:
    """Times from when to when a phase was played; it can be played several times."""

    def __init__(self) -> None:
        self._times: dict[str, list[tuple[float, float]]] = defaultdict(list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._times[name].append((start, time.monotonic()))

    def samples(self, file: Path, name: str) -> Samples:
        """float64[requests, 2] of a phase: µs of CPU from the turn's beginning, and of handling."""
        raw = file.read_bytes()
        all_of_them = np.frombuffer(raw[: len(raw) // 24 * 24]).reshape(-1, 3)
        at = all_of_them[:, 0]
        inside = np.zeros(len(at), dtype=bool)
        for start, end in self._times[name]:
            inside |= (start <= at) & (at <= end)
        return all_of_them[inside, 1:]


def p99(samples: Samples, column: int = 0) -> float:
    return float(np.quantile(samples[:, column], 0.99)) if len(samples) else float("nan")
