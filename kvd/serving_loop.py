"""An asyncio loop that answers requests while it waits for something to do.

asyncio waking up for a descriptor, running a callback and preparing to wait again takes as long as
answering a short request. So the loop's selector takes the turns of one descriptor itself, and goes
back to asyncio only when that has something to do: another descriptor, a timer, a callback. All of
it is one thread.
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
import time
from collections.abc import Callable
from typing import Any

Ready = list[tuple[selectors.SelectorKey, int]]


class ServingSelector(selectors.EpollSelector):
    """Invariant: `due` is True when the loop was given something to do since it began to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.due = False
        self._served: int | None = None
        self._turn: Callable[[], object] = lambda: None
        self._poll = select.poll()  # of the selector's own descriptor and the served one
        self._poll.register(self.fileno(), select.POLLIN)

    def serve(self, fd: int, turn: Callable[[], object]) -> None:
        """Call `turn`, which must not raise, whenever `fd` becomes readable."""
        self._served, self._turn = fd, turn
        self._poll.register(fd, select.POLLIN)

    def stop_serving(self) -> None:
        if self._served is not None:
            self._poll.unregister(self._served)
            self._served = None

    def wait(self, timeout_ms: int | None) -> list[tuple[int, int]]:
        """Which descriptors are ready. A turn of the loop is what happens between two waits."""
        return self._poll.poll(timeout_ms)

    def select(self, timeout: float | None = None) -> Ready:
        end = None if timeout is None else time.monotonic() + timeout
        self.due = False
        if self._served is not None:
            # Whatever asyncio's callbacks did with the served socket, a send for one, may have
            # taken the sign of a message away: look before each wait.
            self._turn()
            if self.due:
                return super().select(0)
        while True:
            # in whole milliseconds, not less than asked for: a timer must be due afterwards
            left_ms = None if timeout is None else max(0, math.ceil(timeout * 1e3))
            ready = self.wait(left_ms)
            others = not ready
            for fd, _ in ready:
                if fd == self._served:
                    self._turn()
                else:
                    others = True
            if others or self.due:
                return super().select(0)
            if end is not None:
                timeout = end - time.monotonic()


class ServingLoop(asyncio.SelectorEventLoop):
    def __init__(self, selector: ServingSelector) -> None:
        self._serving = selector
        super().__init__(selector)

    def call_soon(  # type: ignore[override]  # whatever asyncio passes is passed on
        self, *args: Any, **kwargs: Any
    ) -> asyncio.Handle:
        self._serving.due = True
        return super().call_soon(*args, **kwargs)

    def call_at(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> asyncio.TimerHandle:
        self._serving.due = True
        return super().call_at(*args, **kwargs)
