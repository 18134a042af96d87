"""Workers stopped across a restart of the daemon, and beyond their grace."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import fence
from tests.chaos.played import played


def test_who_wakes_up_too_late_does_no_harm(tmp_path: Path) -> None:
    played(fence, fence.Plan(grace_s=1.0, stopped_s=4.0), tmp_path)
