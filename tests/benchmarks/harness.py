"""What all benchmarks share: rows with target and aim, a table, a JSON file, an exit code.

report = Report("trace", {"capacity": 1000})
report.add(Row(name="hit rate", value=0.08, unit="", target=0.08, aim=0.1, higher_is_better=True))
sys.exit(report.finish())
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tests.benchmarks.machine import ROOT, machine, versions

OUT = ROOT / "build" / "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured value and what it is held against.

    `target` is the first-column budget, whose miss fails the run; `aim` is what we want; a row
    without either informs. `details` go into the JSON beside the rest.
    """

    name: str
    value: float
    unit: str  # "us", "x", "%", "B"; "" for a plain number
    target: float | None = None
    aim: float | None = None
    higher_is_better: bool = False
    note: str = ""  # how it was measured where the budget's words do not say it
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """None for a row that has no target."""
        return self._reaches(self.target)

    @property
    def reached_aim(self) -> bool | None:
        return self._reaches(self.aim)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "aim": self.aim,
            "pass": self.passed,
            "aim_reached": self.reached_aim,
            **({"note": self.note} if self.note else {}),
            **self.details,
        }

    def _reaches(self, limit: float | None) -> bool | None:
        if limit is None:
            return None
        return self.value >= limit if self.higher_is_better else self.value <= limit


class Report:
    """Collects one benchmark's rows and says how far it is.

    Invariant: rows are in the order of the table, names are unique.
    """

    def __init__(
        self,
        name: str,
        configuration: dict[str, Any],
        packages: Sequence[str] = (),
        progress: TextIO = sys.stderr,
    ) -> None:
        """`packages`: whose versions matter to the figures, besides Python's and kvd's."""
        self.name = name
        self.rows: list[Row] = []
        self.extra: dict[str, Any] = {}  # further keys of the JSON file
        self._head = {
            "benchmark": name,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "versions": versions(*packages),
            "configuration": configuration,
        }
        self._progress = progress
        self._start_s = time.monotonic()

    def say(self, what: str) -> None:
        """One line of progress: what is done now, and how long the run has taken."""
        print(
            f"[{time.monotonic() - self._start_s:4.0f} s] {what}", file=self._progress, flush=True
        )

    def add(self, row: Row) -> None:
        if any(row.name == other.name for other in self.rows):
            raise ValueError(f"two rows are named {row.name!r}: say what tells them apart")
        self.rows.append(row)

    def finish(self, out: Path = OUT) -> int:
        """Print the table, write `out`/NAME.json, and return the exit code: 1 after a miss."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{self.name}.json"
        took_s = round(time.monotonic() - self._start_s, 1)
        content = {
            **self._head,
            "took_s": took_s,
            "results": [row.to_json() for row in self.rows],
            **self.extra,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(table(self.rows))
        missed = [row.name for row in self.rows if row.passed is False]
        held = sum(row.passed is True for row in self.rows)
        aims = sum(row.reached_aim is True for row in self.rows)
        print(
            f"\n{held} targets held, {len(missed)} missed, {aims} aims reached, {took_s} s; {path}"
        )
        for name in missed:
            print(f"missed: {name}")
        return 1 if missed else 0


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one a line, with the verdict last; microseconds where they were taken."""
    verdicts = {None: "", True: "pass", False: "MISS"}
    lines = [("what", "measured", "target", "aim", "p50 / p99 us", "")]
    for row in rows:
        sign = "≥" if row.higher_is_better else "≤"
        p50, p99 = row.details.get("p50_us"), row.details.get("p99_us")
        lines.append(
            (
                row.name,
                _shown(row.value, row.unit),
                "" if row.target is None else f"{sign} {_shown(row.target, row.unit)}",
                "" if row.aim is None else f"{sign} {_shown(row.aim, row.unit)}",
                "" if p50 is None or p99 is None else f"{_shown(p50, '')} / {_shown(p99, '')}",
                verdicts[row.passed] + (", aim" if row.reached_aim and row.passed else ""),
            )
        )
    columns = [i for i in range(1, 5) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in (0, *columns)}
    text = []
    for line in lines:
        cells = [line[i].rjust(widths[i]) for i in columns]
        text.append("  ".join([line[0].ljust(widths[0]), *cells, line[5]]).rstrip())
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join(text + ([""] if notes else []) + notes)


def _shown(value: float, unit: str) -> str:
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{digits} {unit}".rstrip() if unit not in ("%", "x") else f"{digits}{unit}"
