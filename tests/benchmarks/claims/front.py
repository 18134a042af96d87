"""The baseline: requests wait in front of the engine until memory for them is reserved."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from modelworker.requests import Delta, Emit, Event, GenerationRequest
from tests.benchmarks.claims.reservations import Reservations


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: GenerationRequest
    num_slots: int
    emit: Emit


class ReservingFront:
    """First come, first served, as kvd's own queue. A sequence that ends makes room within the
    same step, so that the baseline loses no time to the front.

    Invariant: what is inside the engine has each one run of slots, from before it is submitted
    until its last event.
    """

    def __init__(
        self, submit: Callable[[GenerationRequest, Emit], None], reservations: Reservations
    ) -> None:
        self.reservations = reservations
        self._submit = submit
        self._queue: deque[_Waiting] = deque()

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def submit(self, request: GenerationRequest, num_slots: int, emit: Emit) -> None:
        """Queue a request (of n = 1) that needs `num_slots` slots in one run. Raises ValueError
        when it could never have them."""
        taken = self.reservations.length_for(num_slots)
        if taken > self.reservations.num_slots:
            raise ValueError(
                f"a run of {taken} slots can't be had from {self.reservations.num_slots}: "
                "give the baseline more memory, or leave the request out"
            )
        self._queue.append(_Waiting(request, num_slots, emit))
        self._let_in()

    def _let_in(self) -> None:
        while self._queue:
            start = self.reservations.take(self._queue[0].num_slots)
            if start is None:
                return
            waiting = self._queue.popleft()
            self._submit(waiting.request, self._watched(waiting.emit, start))

    def _watched(self, emit: Emit, start: int) -> Emit:
        def told(event: Event) -> None:
            emit(event)
            if not isinstance(event, Delta):  # Finished or Failed: the last one
                self.reservations.give_back(start)
                self._let_in()

        return told
