"""In short: what `python -m tests.chaos daemon` does two hundred times."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import daemon_kills
from tests.chaos.played import played


def test_the_daemon_killed_under_load(tmp_path: Path) -> None:
    plan = daemon_kills.Plan(kills=5, workers=3, num_pages=8192, documents=40, suffixes=6)
    rows = played(daemon_kills, plan, tmp_path)
    assert rows["sessions resumed"].value >= plan.kills
    assert rows["published pages looked for"].value > 10_000
