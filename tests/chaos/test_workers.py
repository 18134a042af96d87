"""In short: what `python -m tests.chaos workers` does a thousand times."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import workers
from tests.chaos.played import played


def test_workers_killed_and_cut_off_under_load(tmp_path: Path) -> None:
    plan = workers.Plan(kills=24, workers=5, num_pages=900, block_kills=12, pause_s=0.05, cuts=0.2)
    rows = played(workers, plan, tmp_path)
    assert rows["workers killed"].value + rows["workers cut off"].value == plan.kills
    assert rows["workers cut off"].value
    assert rows["pages verified"].value > 10_000
    assert rows["pages compared with kvd's holds"].value > 50
