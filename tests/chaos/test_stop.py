"""A worker stopped in the middle of its writing, and continued."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import stop
from tests.chaos.played import played


def test_a_stopped_worker_keeps_what_it_reads_and_writes(tmp_path: Path) -> None:
    played(stop, stop.Plan(stopped_s=3.0), tmp_path)
