"""The ROUTER socket of KV events: who missed batches, or joins late, asks here.

An answer can be as long as the cache, so it goes out a few messages a turn of the loop and only as
fast as its reader reads it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import zmq

from kvd.events.answers import Answer, Message, Refusal, answer
from kvd.events.gate import Gate
from kvd.events.log import EventLog
from kvd.events.sockets import bind, unbind
from kvd.events.wire import MAX_REQUEST_BYTES, BadEventsRequest

MAX_ANSWERS = 32  # under way at once
QUEUED_MESSAGES = 64  # of one answer, in ZeroMQ's hands
REQUESTS_A_TURN = 16
MAX_FRAMES = 8  # of a request that are kept; two are wanted
RETRY_S = 0.01  # until a full queue is looked at again
STALLED_S = 10.0  # an answer is given up when its reader has taken nothing for so long

log = structlog.get_logger()


@dataclass(slots=True)
class ReplayCounts:
    requests: int = 0
    bad_requests: int = 0  # in neither form
    refused: int = 0  # more than MAX_ANSWERS
    given_up: int = 0  # the reader was gone, or took nothing


class _Delivery:
    """One answer on its way to one connection."""

    __slots__ = ("answer", "held", "moved_s", "route")

    def __init__(self, route: bytes, answer: Answer, now: float) -> None:
        self.route, self.answer, self.moved_s = route, answer, now
        self.held: Message | None = None  # found the queue full


class ReplayServer:
    """Answers requests from one log.

    Invariants: at most MAX_ANSWERS are under way (besides refusals, of one message each), one a
    connection; each ends with `close`.
    """

    def __init__(
        self,
        events: EventLog,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        topic: bytes,
        loop: asyncio.AbstractEventLoop,
        wall_clock: Callable[[], float],
        gate: Gate | None = None,
    ) -> None:
        """Raises OSError when the endpoint cannot be bound."""
        self.counts = ReplayCounts()
        self._events, self._topic, self._loop, self._clock = events, topic, loop, wall_clock
        self._deliveries: deque[_Delivery] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reader that is gone is an error here
        if gate is not None:
            gate.guard(self._socket)
        self.endpoint = bind(self._socket, endpoint)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._turn)

    @property
    def num_answers(self) -> int:
        return len(self._deliveries)

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        while self._deliveries:
            self._end(self._deliveries[0])
        self._loop.remove_reader(self._fd)
        unbind(self._socket, self.endpoint)

    def _turn(self) -> None:
        if self._socket.closed:  # between this turn and the one before
            return
        # Also after an error. Sending, too, takes what the descriptor would have told.
        again = self._loop.call_soon(self._turn)
        asked = self._take_requests()
        if not self._deliver() and not asked:
            again.cancel()
            if self._deliveries and self._retry is None:  # all of their readers are behind
                self._retry = self._loop.call_later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._turn()

    # --- requests

    def _take_requests(self) -> bool:
        """Whether there was any."""
        for taken in range(REQUESTS_A_TURN):
            try:
                route = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return taken > 0
            frames: list[bytes] = []
            while self._socket.getsockopt(zmq.RCVMORE):
                frame = self._socket.recv()
                if len(frames) < MAX_FRAMES:
                    frames.append(frame)
            self._asked(route, frames)
        return True

    def _asked(self, route: bytes, frames: list[bytes]) -> None:
        self.counts.requests += 1
        for delivery in self._deliveries:
            if delivery.route == route:  # wants something else now
                self._end(delivery)
                break
        self._deliveries.append(_Delivery(route, self._answer(frames), self._loop.time()))

    def _answer(self, frames: list[bytes]) -> Answer:
        if len(self._deliveries) >= MAX_ANSWERS:
            self.counts.refused += 1
            return Refusal(f"{MAX_ANSWERS} answers are under way: ask again in a second")
        try:
            return answer(self._events, self._topic, frames)
        except BadEventsRequest as e:
            self.counts.bad_requests += 1
            log.warning("events.bad_request", reason=str(e))
            return Refusal(str(e))

    # --- answers

    def _deliver(self) -> bool:
        """Go on with the first answer that can go on; whether one could."""
        for delivery in list(self._deliveries):
            self._deliveries.rotate(-1)
            try:
                if self._advance(delivery):
                    return True
            except zmq.ZMQError as e:  # EHOSTUNREACH: its reader is gone
                self._give_up(delivery, str(e))
            except Exception:
                log.exception("events.answer_failed")
                self._give_up(delivery, "internal error")
        return False

    def _advance(self, delivery: _Delivery) -> bool:
        for sent in range(delivery.answer.at_once):
            message = delivery.held or delivery.answer.next(self._clock())
            if message is None:
                self._end(delivery)
                return True
            try:
                self._socket.send_multipart([delivery.route, b"", *message], zmq.NOBLOCK)
            except zmq.Again:
                delivery.held = message
                if self._loop.time() - delivery.moved_s > STALLED_S:
                    self._give_up(delivery, f"nothing was read for {STALLED_S:g} s")
                return sent > 0
            delivery.held, delivery.moved_s = None, self._loop.time()
        return True

    def _give_up(self, delivery: _Delivery, reason: str) -> None:
        self.counts.given_up += 1
        log.warning("events.answer_given_up", reason=reason)
        self._end(delivery)

    def _end(self, delivery: _Delivery) -> None:
        self._deliveries.remove(delivery)
        delivery.answer.close()
