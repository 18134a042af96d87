"""Every refusal counts; the log of them cannot be flooded."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import pytest
import structlog

from kvd.refusals import BURST, MAX_USERS, Refusals
from kvd_shared.errors import BadRequest, NotAllowed


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refuse(refusals: Refusals, uid: int, times: int = 1) -> list[MutableMapping[str, Any]]:
    with structlog.testing.capture_logs() as lines:
        for _ in range(times):
            error = NotAllowed("no", reason="wrong_role")
            refusals.note(error, channel="rpc", uid=uid, pid=7, role="worker", op="evict")
    return list(lines)


def test_a_line_says_who_and_why(clock: Clock) -> None:
    [line] = refuse(Refusals(clock), 5)
    assert line == {
        "event": "access.refused",
        "log_level": "warning",
        "channel": "rpc",
        "reason": "wrong_role",
        "uid": 5,
        "pid": 7,
        "role": "worker",
        "unlogged": 0,
        "why": "no",
        "op": "evict",
    }


def test_a_flood_is_counted_and_not_all_logged(clock: Clock) -> None:
    refusals = Refusals(clock)
    assert len(refuse(refusals, 5, 1000)) == BURST
    assert refusals.counts == {"wrong_role": 1000}
    assert len(refuse(refusals, 6)) == 1  # another user's is still seen
    clock.now += 1.0
    [line, *more] = refuse(refusals, 5, 10)
    assert (line["unlogged"], more) == (1000 - BURST, [])
    clock.now += 3600.0
    assert len(refuse(refusals, 5, 1000)) == BURST


def test_many_users_cost_no_more_memory(clock: Clock) -> None:
    refusals = Refusals(clock)
    for uid in range(3 * MAX_USERS):
        assert refuse(refusals, uid)
        assert len(refusals._buckets) <= MAX_USERS


def test_without_a_reason_the_code_is_one(clock: Clock) -> None:
    refusals = Refusals(clock)
    refusals.note(BadRequest("what?"), channel="lease", uid=1, pid=1, role=None)
    assert refusals.counts == {"bad_request": 1}
