"""Others do not wait for clients without consideration."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import overload
from tests.chaos.played import played


def test_others_are_served_meanwhile(tmp_path: Path) -> None:
    modes = ("flood", "heavy", "huge", "deaf", "idle")
    played(overload, overload.Plan(seconds=2.0, num_pages=4096, modes=modes), tmp_path)


def test_who_makes_no_sense_is_disconnected(tmp_path: Path) -> None:
    played(overload, overload.Plan(seconds=2.0, num_pages=4096, modes=("garbage",)), tmp_path)
