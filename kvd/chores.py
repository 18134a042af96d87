"""What can wait, done between requests in turns of a quarter of a millisecond.

Chores are the caches' own (taking back what the dead held, dropping what was flushed or expired)
and jobs: generators that answer a request in slices.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import structlog

from kvd.daemon import Daemon
from kvd_shared.errors import Busy

TURN_S = 0.00025
MAX_JOBS = 64  # at once
RETRY_S = 1.0  # after a chore has failed
Job = Generator[None, None, dict[str, Any]]

log = structlog.get_logger()


class Chores:
    """Invariant: while there is anything to do, a turn is scheduled."""

    def __init__(self, daemon: Daemon, loop: asyncio.AbstractEventLoop) -> None:
        self._daemon, self._loop = daemon, loop
        self._jobs: deque[tuple[Job, Callable[[Job], bool]]] = deque()
        self._turn: asyncio.Handle | None = None

    def check_room(self) -> None:
        """Raises Busy where too many jobs are under way."""
        if len(self._jobs) >= MAX_JOBS:
            raise Busy(f"{MAX_JOBS} long requests are under way: ask again later")

    def add(self, job: Job, advance: Callable[[Job], bool]) -> None:
        """`advance` does one slice and returns whether there are more; it does not raise."""
        self._jobs.append((job, advance))
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        if self._turn is None and (self._jobs or self._caches_have_chores()):
            self._turn = self._loop.call_soon(self._run)

    def close(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
        for job, _ in self._jobs:
            job.close()

    def _caches_have_chores(self) -> bool:
        now = time.monotonic()
        return any(pool.cache.has_chores(now) for pool in self._daemon.pools.values())

    def _run(self) -> None:
        self._turn = None
        end = time.monotonic() + TURN_S
        try:
            while (now := time.monotonic()) < end:
                busy = [pool.cache.sweep(now) for pool in self._daemon.pools.values()]
                if self._jobs:
                    job, advance = self._jobs.popleft()
                    if advance(job):
                        self._jobs.append((job, advance))
                if not any(busy) and not self._jobs:
                    break
        except Exception as e:
            # A bug. At once it would only fail again, and nobody would be served meanwhile.
            log.error("chores.failed", exc_info=e, retry_s=RETRY_S)
            self._turn = self._loop.call_later(RETRY_S, self._run)
        self.wake()
