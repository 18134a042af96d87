"""What a worker did, in a form that survives its SIGKILL: records of 24 bytes and some counters.

Both are files in a directory of the run. Records are appended by plain writes, counters are a
shared mapping: neither is lost with the process, only with the machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RECORD = np.dtype([("t", "<f8"), ("ref", "<i8"), ("kind", "<u4"), ("extra", "<u4")])
Records = npt.NDArray[np.void]


class Kind(IntEnum):
    """Times are CLOCK_MONOTONIC, seconds. What begins is noted after the reply, what ends before
    the request: between the two the page is surely the worker's."""

    ATTACHED = 1  # ref: the pool's id; extra: the session
    OWN = 2  # the worker's to write from now on
    READ = 3  # held, not to be written
    SEALED = 4  # was the worker's to write; from now on only held
    LET_GO = 5  # its last hold is about to end
    KNOWN = 6  # ref: number of the path; extra: pages of it that are published
    DAEMON_GONE = 7
    RESUMED = 8
    LOST = 9  # all that was held is lost: the session is over, or the pool is another one
    CUT = 10  # the worker has closed its lease connection and lives on
    FENCED = 11  # ref: ns, when it last saw that it was not; what it read since is thrown away


class Counter(IntEnum):
    """Places in the counters' file."""

    STEPS = 0
    REQUESTS = 1  # completed, all of their pages verified
    PAGES_WRITTEN = 2
    PAGES_VERIFIED = 3
    MATCHED_PAGES = 4
    FORKS = 5
    TAILS = 6  # sealed and handed over
    TAKEN_OVER = 7
    YIELDED = 8
    NO_PAGES = 9
    REFUSED = 10  # other typed errors that may happen
    ATTACHED = 11
    RESUMED = 12
    VIOLATIONS = 13
    LATE_REFUSED = 14  # requests of a cut session, as they must be
    PARTIAL = 15  # partial pages copied
    FENCED = 16


class History:
    """One worker's files `NAME.records`, `NAME.counters` and `NAME.violations` in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._fd = os.open(records_file(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        path = counters_file(folder, name)
        self._counters = np.memmap(path, "<u8", "w+", shape=(len(Counter),))
        self._pending: list[tuple[float, int, int, int]] = []

    def count(self, counter: Counter, by: int = 1) -> None:
        self._counters[counter] += by

    def note(self, kind: Kind, refs: Iterable[int], extra: int = 0) -> None:
        """Now. `flush` makes it last."""
        now = time.monotonic()
        self._pending += [(now, ref, kind, extra) for ref in refs]

    def flush(self) -> None:
        if self._pending:
            os.write(self._fd, np.array(self._pending, dtype=RECORD).tobytes())
            self._pending.clear()

    def violation(self, what: str, **details: Any) -> None:
        """Something that must never happen has: written at once."""
        self.count(Counter.VIOLATIONS)
        line = {"t": time.monotonic(), "worker": self._name, "what": what, **details}
        with violations_file(self._folder, self._name).open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


def records_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.records"


def counters_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.counters"


def violations_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.violations"


def read_records(folder: Path, name: str) -> Records:
    """What has been flushed; a record that a kill has cut is left out."""
    path = records_file(folder, name)
    raw = path.read_bytes() if path.exists() else b""
    return np.frombuffer(raw[: len(raw) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)


def read_counters(folder: Path, name: str) -> dict[str, int]:
    path = counters_file(folder, name)
    raw = path.read_bytes() if path.exists() else b""
    values = np.frombuffer(raw, "<u8").tolist() or [0] * len(Counter)
    return {counter.name.lower(): values[counter] for counter in Counter}


def read_violations(folder: Path, name: str) -> list[dict[str, Any]]:
    path = violations_file(folder, name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_holds(file: Path) -> tuple[int, dict[int, int]]:
    """What a worker that stands still has written: its session, and how often it holds what."""
    found = json.loads(file.read_text())
    return found["session"], {int(ref): count for ref, count in found["holds"].items()}
