"""In short: what `python -m tests.chaos soak` does for half an hour."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import soak
from tests.chaos.played import played


def test_blows_of_all_kinds_under_mixed_load(tmp_path: Path) -> None:
    plan = soak.Plan(seconds=16.0, round_s=8.0, blows_a_minute=90.0, workers=4, num_pages=160)
    rows = played(soak, plan, tmp_path)
    assert rows["times that pages were refused"].value
    assert rows["requests completed"].value > 500
