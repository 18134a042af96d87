"""In short: what `python -m tests.chaos fuzz` sends a million of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.chaos import fuzz
from tests.chaos.played import played


def test_messages_that_no_client_would_send(tmp_path: Path) -> None:
    rows = played(fuzz, fuzz.Plan(messages=16_000, restarts=4), tmp_path)
    assert rows["messages"].value >= 16_000
    assert rows["sessions resumed among faults"].value
    assert 12_000 < rows["refused"].value < rows["messages"].value


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    plan = fuzz.Plan(seed=3, messages=2_000, block=500, first_block=2, restarts=0)
    plan = replace(plan, progress=progress)
    rows = played(fuzz, plan, tmp_path)
    assert 1_000 <= rows["messages"].value < 1_400
    assert progress.read_text() == '{"seed": 3, "next": 4}'
