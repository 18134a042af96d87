"""The sockets of one pool's KV events: PUB for the stream, and the replay server's ROUTER.

Plain ZeroMQ sockets on the daemon's loop, as in kvd/rpc_server.py. Nothing here blocks, and nothing
grows with a slow consumer: what is over PUB's high-water mark is lost to that subscriber, who sees
a hole in the sequence numbers and asks for a replay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import structlog
import zmq

from kvd.events.gate import Gate
from kvd.events.keys import read_keys
from kvd.events.log import EventLog
from kvd.events.options import EventsOptions
from kvd.events.replay_server import ReplayServer
from kvd.events.sockets import bind, unbind
from kvd.events.wire import seq_frame

log = structlog.get_logger()


class Publisher:
    """Publishes what one log is told, in the turn after it was told.

    Invariant: while it is open, every batch of the log has been handed to the PUB socket, in order.
    """

    def __init__(
        self,
        events: EventLog,
        options: EventsOptions,
        loop: asyncio.AbstractEventLoop,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises OSError when an endpoint cannot be bound, BadKeys."""
        self._events, self._loop, self._clock = events, loop, wall_clock
        self._topic = options.topic.encode()
        self._heartbeat_s = options.heartbeat_s
        self._publishing = False  # a turn that drains the log is coming
        self._last_beat_seq = events.next_seq
        keys = read_keys(options) if options.has_keys else None
        self._context = zmq.Context()
        self.replay: ReplayServer | None = None
        self.gate = Gate(self._context, keys, loop) if keys is not None else None
        try:
            self._socket = self._context.socket(zmq.PUB)
            if self.gate is not None:
                self.gate.guard(self._socket)
            self._socket.setsockopt(zmq.SNDHWM, options.hwm)
            self.endpoint = bind(self._socket, options.endpoint)
            if options.replay_endpoint is not None:
                self.replay = ReplayServer(
                    events,
                    self._context,
                    options.replay_endpoint,
                    self._topic,
                    loop,
                    wall_clock,
                    self.gate,
                )
        except OSError:
            if self.gate is not None:
                self.gate.close()
            self._context.destroy(linger=0)
            raise
        events.wake = self._wake
        self._wake()  # the epoch's beginning waits in the log
        self._heart = loop.call_later(self._heartbeat_s or 0, self._beat)

    @property
    def is_open(self) -> bool:
        return not self._socket.closed

    def report(self) -> dict[str, Any]:
        """For operators: where, how far, and what went wrong."""
        events, replay = self._events, self.replay
        return {
            "open": self.is_open,
            "endpoint": self.endpoint,
            "replay_endpoint": replay and replay.endpoint,
            "encrypted": self.gate is not None,
            "refused_clients": self.gate.refusals.counts.total() if self.gate else 0,
            "epoch": events.epoch.hex(),
            "first_seq": events.first_seq,
            "next_seq": events.next_seq,
            "first_kept": events.first_kept,
            "pending": events.num_pending,
            "num_pages": events.table.num_pages,
            "answers": replay.num_answers if replay else 0,
            **asdict(events.counts),
            **(asdict(replay.counts) if replay else {}),
        }

    def close(self) -> None:
        """Also closes the log. As often as one likes."""
        if not self.is_open:
            return
        self._events.close()
        self._heart.cancel()
        if self.replay is not None:
            self.replay.close()
        unbind(self._socket, self.endpoint)
        if self.gate is not None:
            self.gate.close()
        self._context.term()  # waits until the last messages are out

    def _wake(self) -> None:
        if not self._publishing:
            self._publishing = True
            self._loop.call_soon(self._publish)

    def _publish(self) -> None:
        self._publishing = False
        if not self.is_open:
            return
        try:
            batch = self._events.drain(self._clock())
        except Exception:
            # Routers would believe a stream that goes on without what was lost here.
            log.exception("events.stopped")
            self.close()
            return
        if batch is not None:
            self._send(*batch)
        if self._events.dirty:
            self._wake()

    def _send(self, seq: int, payload: bytes) -> None:
        self._socket.send_multipart([self._topic, seq_frame(seq), payload], zmq.NOBLOCK)

    def _beat(self) -> None:
        if not self._heartbeat_s:
            return
        if self._events.next_seq == self._last_beat_seq:
            self._send(*self._events.heartbeat(self._clock()))
        self._last_beat_seq = self._events.next_seq
        self._heart = self._loop.call_later(self._heartbeat_s, self._beat)
