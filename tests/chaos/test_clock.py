"""A wall clock that jumps by days."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import clock
from tests.chaos.played import played


def test_nothing_hangs_on_the_wall_clock(tmp_path: Path) -> None:
    played(clock, clock.Plan(seconds=4.0), tmp_path)
