"""The worker's engine, watched: who runs and which slots are taken, at every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from modelworker.attachment import Attachment
from modelworker.chunk import Chunk
from modelworker.engine import WorkerEngine
from modelworker.scheduler import Scheduler
from modelworker.sequence import Sequence
from tests.benchmarks.claims.front import ReservingFront
from tests.benchmarks.claims.plan import Usage


class Meter:
    """Time-weighted sums: a step's usage counts for as long as it lasts, up to the next step.

    Only steps during which requests wait for room count; before the list runs out every mode has
    all the work that it could take.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total = Usage()
        self.seconds = 0.0
        self.num_steps = 0
        self.computed_tokens = 0
        self._clock = clock
        self._last: tuple[float, Usage] | None = None

    def step(self, usage: Usage, num_tokens: int, waiting: bool) -> None:
        now = self._clock()
        if self._last is not None:
            since, last = self._last
            self.total.add(last, now - since)
            self.seconds += now - since
        self._last = (now, usage) if waiting else None
        self.num_steps += 1
        self.computed_tokens += num_tokens

    def mean(self) -> Usage | None:
        """None where no request ever waited: then memory was no limit."""
        if not self.seconds:
            return None
        mean = Usage()
        mean.add(self.total, 1 / self.seconds)
        return mean


class MeasuredEngine(WorkerEngine):
    """`meter` sees every step; set `front` while a front reserves what the engine computes."""

    meter: Meter
    front: ReservingFront | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.meter = Meter()
        run = self._work.run

        def measured(attached: Attachment, chunks: list[Chunk]) -> None:
            self._watch(self._work.scheduler, chunks)
            run(attached, chunks)

        self._work.run = measured  # type: ignore[method-assign]

    @property
    def busy(self) -> bool:
        return self._has_work()

    def _watch(self, scheduler: Scheduler, chunks: list[Chunk]) -> None:
        inside = [*scheduler.running, *scheduler.waiting]
        if self.front is None:
            usage = paged_usage(scheduler.running, scheduler.page_size)
            waiting = bool(scheduler.waiting)
        else:
            # whoever has a reservation counts with all tokens that are known, computed or not
            taken, used = self.front.reservations.num_taken, sum(s.num_tokens for s in inside)
            usage = Usage(len(scheduler.running), taken, used)
            waiting = bool(self.front.num_queued)
        self.meter.step(usage, sum(chunk.num_tokens for chunk in chunks), waiting)


def paged_usage(running: list[Sequence], page_size: int) -> Usage:
    """A page that several sequences hold is taken once; only tails of last pages are unused."""
    pages = {ref for sequence in running for ref in sequence.refs}
    unused = sum(max(0, len(s.refs) * page_size - s.num_tokens) for s in running)
    taken = len(pages) * page_size
    return Usage(len(running), taken, taken - unused)
