"""A scenario in short, for tests: played to its end, every promise kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Report, Row

# Times are promises of a machine that has nothing else to do, and figures of `make chaos`. What
# takes so many times as long has a fault all the same.
GENEROUS = 10.0


def played(scenario: Any, plan: Any, tmp_path: Path) -> dict[str, Row]:
    """Its rows by name. Fails where one has missed its target: a time by far; ratios of times not
    at all, for a short run has too few of them."""
    report = Report(scenario.NAME, {})
    scenario.play(report, plan)
    report.finish(tmp_path)
    missed = {r.name: r.value for r in report.rows if _missed(r)}
    assert not missed, (missed, report.extra)
    return {row.name: row for row in report.rows}


def _missed(row: Row) -> bool:
    if row.passed is not False or row.unit == "x":
        return False
    if row.unit == "ms":
        return row.target is None or row.value > GENEROUS * row.target
    return True
