"""What other threads hand to the engine's."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue

from modelworker.requests import Emit, GenerationRequest

Arrived = tuple[GenerationRequest, Emit]


class Intake:
    """New requests and cancellations. `put`, `cancel` and `wake` may be called from any thread."""

    def __init__(self) -> None:
        # not an Event: `wake` is called from a signal handler, which may interrupt this very thread
        # inside the Event's lock; SimpleQueue.put is reentrant
        self._wake: SimpleQueue[None] = SimpleQueue()
        self.lock = threading.Lock()  # guards the two below
        self._arrived: deque[Arrived] = deque()
        self._cancelled: set[str] = set()

    def put(self, request: GenerationRequest, emit: Emit) -> None:
        """The caller has the lock, and wakes the engine afterwards."""
        self._arrived.append((request, emit))

    def cancel(self, request_id: str) -> None:
        with self.lock:
            self._cancelled.add(request_id)
        self.wake()

    def wake(self) -> None:
        self._wake.put(None)

    def wait(self, seconds: float) -> None:
        """Until something comes in, or so long."""
        with suppress(Empty):
            if seconds:
                self._wake.get(timeout=seconds)
            while True:
                self._wake.get_nowait()

    def take(self) -> tuple[list[Arrived], set[str]]:
        """What has arrived and is not cancelled, and the cancellations of what came before."""
        with self.lock:
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, set()
        return [each for each in arrived if each[0].request_id not in cancelled], cancelled

    def __bool__(self) -> bool:
        return bool(self._arrived)

    @property
    def num_sequences(self) -> int:
        return sum(request.n for request, _ in list(self._arrived))
