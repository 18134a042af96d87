"""The RPC channel's daemon side: a ROUTER drained from the event loop.

A plain ZeroMQ socket, not zmq.asyncio, which costs a third of a round trip; the loop calls its
turns (see serving_loop.py). Its file descriptor is edge-triggered, so every turn reads until
nothing is left or hands over to another turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgpack
import structlog
import zmq

from kvd.chores import Chores
from kvd.daemon import Daemon
from kvd.dispatch import perform
from kvd.report_parts import Sliced
from kvd_shared.calls import arrays_out
from kvd_shared.errors import BadRequest, Busy, KvdError
from kvd_shared.lease import RPC_SOCKET
from kvd_shared.wire import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    FrameWriter,
    error_reply,
    read_header,
)

FLUSH_MS = 500  # for the last answers, on closing
MAX_INLINE_BYTES = 1 << 20  # of a reply's header, in arrays
TURN_S = 0.00025  # then timers, leases and chores have their turn
REMEMBERED_ROUTES = 4096
MAX_WAITING = 1024  # messages of one peer, behind a long request

# Plain integers: with pyzmq's enums each use costs a microsecond.
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)

log = structlog.get_logger()
_HEADER = {"v", "session", "seq", "op", "args"}


class RpcServer:
    """Answers every message that has a sender, with its result or a typed error."""

    def __init__(self, daemon: Daemon, socket_dir: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._daemon, self._loop = daemon, loop
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error here
        self._path = socket_dir / RPC_SOCKET
        try:
            self._socket.bind(f"ipc://{self._path}")
        except zmq.ZMQError as e:
            raise OSError(e.errno, f"cannot listen on {self._path}: {e.strerror}") from e
        self._path.chmod(0o660)
        self._pids: dict[bytes, int] = {}  # by route
        # by route, while a long request of it is under way: (pid, frames) of what came behind it
        self._under_way: dict[bytes, deque[tuple[int, list[bytes]]]] = {}
        self._chores = Chores(daemon, loop)
        daemon.wake = self._wake
        self.fd = int(self._socket.getsockopt(zmq.FD))  # readable: `turn` is wanted

    def close(self) -> None:
        """Nothing calls `turn` any more."""
        self._chores.close()
        self._socket.close(linger=FLUSH_MS)
        self._context.term()  # waits for that
        self._path.unlink(missing_ok=True)

    def _wake(self) -> None:
        """Something has happened to a session: others may wait for news of it, and there may be
        chores."""
        if not self._socket.closed:
            self.pass_on_notices()
            self._chores.wake()

    def turn(self) -> None:
        """Answer what has come. Does not raise."""
        if self._socket.closed:  # between this turn and the one before
            return
        try:
            self._drain()
        except Exception as e:  # a bug; the next message may be another one
            log.error("rpc.internal_error", exc_info=e)
            self._loop.call_soon(self.turn)

    def _drain(self) -> None:
        socket: Any = self._socket
        end = time.monotonic() + TURN_S
        done = False
        try:
            # the descriptor has an edge only where nothing was queued: read until nothing is
            while True:
                try:  # mostly there is one; asking first would cost as much as reading it
                    frame = sender = socket.recv(NOBLOCK, False)
                except zmq.Again:
                    done = True
                    break
                route, frames = sender.bytes, []
                while frame.more:
                    frame = socket.recv(NOBLOCK, False)
                    frames.append(frame.bytes)
                self._handle(route, self._pid_of(route, sender), frames)
                done = not socket.getsockopt(EVENTS) & POLLIN
                if done or time.monotonic() >= end:
                    break
            if not done:
                self._loop.call_soon(self.turn)
        finally:
            self._chores.wake()

    def _handle(self, route: bytes, pid: int, frames: list[bytes]) -> None:
        """Answer a message, after those that came before it from the same peer."""
        waiting = self._under_way.get(route)
        if waiting is None:
            answer = self._answer(route, pid, frames)
        elif len(waiting) < MAX_WAITING:
            waiting.append((pid, frames))
            return
        else:
            answer = self._refusal(0, Busy(f"{MAX_WAITING} messages wait behind a long request"))
        if answer is not None:
            self._send(route, answer)
        self.pass_on_notices()

    def _pid_of(self, route: bytes, sender: zmq.Frame) -> int:
        """The process at the other end of a connection. Routes that libzmq itself gave (they begin
        with a zero byte, which no client's own may) are never another connection's."""
        pid = self._pids.get(route)
        if pid is None:
            pid = peer_pid(sender)
            if route.startswith(b"\0"):
                if len(self._pids) >= REMEMBERED_ROUTES:
                    self._pids.clear()
                self._pids[route] = pid
        return pid

    def _answer(self, route: bytes, pid: int, frames: list[bytes]) -> list[bytes] | None:
        """The answer, or None if it comes later: the request is done in slices."""
        seq = 0
        try:
            header = read_header(frames)
            if type(header.get("seq")) is int and header["seq"] > 0:
                seq = header["seq"]
            if not seq or header.keys() != _HEADER:
                raise BadRequest(f"a request's header has exactly {sorted(_HEADER)}, seq from 1")
            detaching = header["op"] == "detach"
            attachment = self._daemon.attachment(header["session"], pid, ended_too=detaching)
            attachment.route = route
            result = perform(
                self._daemon, attachment, header["op"], header["args"], frames, time.monotonic()
            )
            if isinstance(result, dict):
                return self._reply(seq, result)
            if attachment.role == "admin":  # before anything is done
                self._chores.check_room()
            done = _slice(result)  # most need no second one
            if done is not None:
                return self._reply(seq, done)
            self._under_way[route] = deque()
            self._chores.add(result, lambda job: self._advance(job, route, seq))
            return None
        except Exception as e:
            return self._refusal(seq, e)

    def _advance(self, job: Sliced, route: bytes, seq: int) -> bool:
        """One slice of a request; the last one answers it, and what has come behind it."""
        try:
            result = _slice(job)
            if result is None:
                return True
            answer = self._reply(seq, result)
        except Exception as e:
            answer = self._refusal(seq, e)
        self._send(route, answer)
        self.pass_on_notices()
        waiting = self._under_way.pop(route)
        while waiting:
            self._handle(route, *waiting.popleft())
            if route in self._under_way:  # that one is long, too
                self._under_way[route] = waiting
                break
        return False

    def _refusal(self, seq: int, error: Exception) -> list[bytes]:
        if not isinstance(error, KvdError):
            # A bug must not take the pages of every worker with it. `audit` tells what it did.
            log.error("rpc.internal_error", exc_info=error)
            error = KvdError(f"internal error: {type(error).__name__}: {error}")
        self._daemon.refused[error.code] += 1
        return error_reply(seq, error)

    def _reply(self, seq: int, result: dict[str, Any]) -> list[bytes]:
        writer = FrameWriter(MAX_INLINE_BYTES)
        if "results" in result:
            result = {"results": [self._entry(entry, writer) for entry in result["results"]]}
        else:
            result = arrays_out(result, writer)
        return writer.message({"v": PROTOCOL_VERSION, "seq": seq, "result": result})

    def _entry(self, entry: dict[str, Any], writer: FrameWriter) -> dict[str, Any]:
        if "error" in entry:
            self._daemon.refused[entry["error"]["code"]] += 1
            return entry
        return {"result": arrays_out(entry["result"], writer)}

    def pass_on_notices(self) -> None:
        """Tell the workers what the caches have for them."""
        for pool in self._daemon.pools.values():
            notices = pool.cache.notices
            if not notices:
                continue
            pool.cache.notices = []
            for kind, request, tokens in notices:
                attachment = self._daemon.attachments.get(request.session.id)
                if attachment is not None and attachment.route is not None:
                    self._notify(attachment.route, kind, request.number, tokens)

    def _notify(self, route: bytes, kind: str, request: int, tokens: int) -> None:
        notice = {"v": PROTOCOL_VERSION, "notice": kind, "request": request, "tokens": tokens}
        if kind == "yield":
            log.info("request.asked_to_yield", request=request)
        self._send(route, [msgpack.packb(notice)])

    def _send(self, route: bytes, frames: list[bytes]) -> None:
        try:
            self._socket.send(route, NOBLOCK | SNDMORE)
            for frame in frames[:-1]:
                self._socket.send(frame, NOBLOCK | SNDMORE)
            self._socket.send(frames[-1], NOBLOCK)
        except zmq.ZMQError as e:  # EHOSTUNREACH: it is gone. EAGAIN: it does not read.
            log.warning("rpc.reply_dropped", reason=str(e))


def _slice(job: Sliced) -> dict[str, Any] | None:
    """One slice more: the result if it was the last."""
    try:
        next(job)
    except StopIteration as e:
        result: dict[str, Any] = e.value
        return result
    return None


def peer_pid(frame: zmq.Frame) -> int:
    """The process that sent a frame, as the kernel told libzmq; 0 if it did not."""
    try:
        user_group_pid = str(frame.get("Peer-Address"))  # "localhost:0:0:4711"
        return int(user_group_pid.rpartition(":")[2])
    except (zmq.ZMQError, ValueError):
        return 0
