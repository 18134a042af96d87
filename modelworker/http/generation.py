"""The engine requests behind one HTTP request, as one stream of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from modelworker.requests import (
    Delta,
    Emit,
    Engine,
    Event,
    Failed,
    Finished,
    GenerationRequest,
)


class Generation:
    """Started once, iterated once, closed always; `close` cancels what has not ended.

    `cached_tokens` and `completion_tokens` are complete when the events are.
    """

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        self._engine = engine
        self._requests = requests
        # unbounded: max_tokens bounds it, and a slow reader must not stop the engine
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._unfinished: dict[int, int] = {}  # request's position: continuations that still run
        self._cached = [0] * len(requests)
        self.completion_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self._requests)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)

    def start(self) -> None:
        """Submits all requests or, where the engine refuses one, none; raises its refusal."""
        loop = asyncio.get_running_loop()
        try:
            for position, request in enumerate(self._requests):
                self._engine.submit(request, self._bridge(loop, position))
                self._unfinished[position] = request.n
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Delta | Finished]]:
        """Each event with the index of its choice: prompts in order, n choices each.

        Raises the error of the first request that failed.
        """
        while self._unfinished:
            position, event = await self._events.get()
            if isinstance(event, Failed):
                del self._unfinished[position]
                raise event.error
            if isinstance(event, Finished):
                self._count(position, event)
            yield position * self._requests[position].n + event.index, event

    def close(self) -> None:
        for position in self._unfinished:
            self._engine.cancel(self._requests[position].request_id)
        self._unfinished.clear()

    def _bridge(self, loop: asyncio.AbstractEventLoop, position: int) -> Emit:
        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(self._events.put_nowait, (position, event))

        return emit

    def _count(self, position: int, finished: Finished) -> None:
        self.completion_tokens += finished.num_generated
        self._cached[position] = max(self._cached[position], finished.cached_tokens)
        self._unfinished[position] -= 1
        if not self._unfinished[position]:
            del self._unfinished[position]
