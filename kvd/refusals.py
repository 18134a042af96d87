"""Whom the daemon refused, and why: every refusal counts, a flood is not all logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from kvd_shared.errors import KvdError

BURST = 20  # lines of one user at once
LINES_PER_S = 1.0  # of one user, in the long run
MAX_USERS = 256  # told apart; beyond that the record begins anew

log = structlog.get_logger()


@dataclass(slots=True)
class _Bucket:
    lines: float
    filled_s: float
    unlogged: int = 0


class Refusals:
    """`counts`: by reason, since the start. A user who is refused all the time cannot hide another
    one: each has lines of its own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._buckets: dict[int, _Bucket] = {}

    def note(
        self, error: KvdError, *, channel: str, uid: int, pid: int, role: str | None, **more: object
    ) -> None:
        """`uid` and `pid` are the kernel's word, `role` what was asked for or is the session's."""
        reason = reason_of(error)
        self.counts[reason] += 1
        bucket = self._bucket(uid)
        if bucket.lines < 1:
            bucket.unlogged += 1
            return
        bucket.lines -= 1
        log.warning("access.refused", channel=channel, reason=reason, uid=uid, pid=pid, role=role,
                    unlogged=bucket.unlogged, why=error.message, **more)  # fmt: skip
        bucket.unlogged = 0

    def _bucket(self, uid: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.get(uid)
        if bucket is None:
            if len(self._buckets) >= MAX_USERS:
                self._buckets.clear()
            bucket = self._buckets[uid] = _Bucket(BURST, now)
        bucket.lines = min(BURST, bucket.lines + (now - bucket.filled_s) * LINES_PER_S)
        bucket.filled_s = now
        return bucket


def reason_of(error: KvdError) -> str:
    """What a refusal is counted under: the reason that the error names, else its code."""
    return str(error.details.get("reason", error.code.lower()))
