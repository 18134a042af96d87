"""Connections that send what makes no sense: beyond a measure they are not listened to any more.

Each connection may err now and then. A bucket of errors is emptied by them and filled by time; who
finds it empty is dropped for good, for a client that does not know its own protocol will not learn
it by answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BURST = 4096  # errors of one connection at once
ERRORS_PER_S = 100.0  # of one connection, in the long run
MAX_CONNECTIONS = 1024  # told apart; beyond that the record begins anew

Connection = tuple[bytes, tuple[int, int]]  # route, and pid and uid


@dataclass(slots=True)
class _Bucket:
    errors: float
    filled_s: float


class Breaches:
    """`ignored`: connections of which nothing is answered. `num_dropped`: their messages since."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.ignored: set[Connection] = set()
        self.num_ignored = 0  # since the start
        self.num_dropped = 0
        self._clock = clock
        self._buckets: dict[Connection, _Bucket] = {}

    def note(self, connection: Connection) -> bool:
        """One senseless message more; whether it was one too many."""
        now = self._clock()
        bucket = self._buckets.get(connection)
        if bucket is None:
            if len(self._buckets) >= MAX_CONNECTIONS:
                self._buckets.clear()
            bucket = self._buckets[connection] = _Bucket(BURST, now)
        bucket.errors += (now - bucket.filled_s) * ERRORS_PER_S
        bucket.errors = min(BURST, bucket.errors) - 1
        bucket.filled_s = now
        if bucket.errors >= 0:
            return False
        del self._buckets[connection]
        if len(self.ignored) >= MAX_CONNECTIONS:
            self.ignored.clear()
        self.ignored.add(connection)
        self.num_ignored += 1
        return True
