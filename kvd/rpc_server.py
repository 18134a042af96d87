"""The RPC channel's daemon side: a ROUTER drained from the event loop.

A plain ZeroMQ socket on `loop.add_reader`, not zmq.asyncio, which costs a third of a round trip.
Its file descriptor is edge-triggered, so every turn reads until nothing is left or hands over to
another turn.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgpack
import structlog
import zmq

from kvd.daemon import Attachment, Daemon
from kvd.dispatch import perform
from kvd_shared.errors import BadRequest, KvdError
from kvd_shared.lease import RPC_SOCKET
from kvd_shared.verbs import arrays_out
from kvd_shared.wire import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    FrameWriter,
    error_reply,
    read_header,
)

FLUSH_MS = 500  # for the last answers, on closing
MESSAGES_A_TURN = 32  # then timers and leases have their turn

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
        self._fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._turn)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=FLUSH_MS)
        self._context.term()  # waits for that
        self._path.unlink(missing_ok=True)

    def _turn(self) -> None:
        if self._socket.closed:  # between this turn and the one before
            return
        # Also after an error: what is queued makes no new edge on the descriptor.
        again = self._loop.call_soon(self._turn)
        for _ in range(MESSAGES_A_TURN):
            try:
                sender = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                again.cancel()
                return
            frames = self._socket.recv_multipart() if sender.more else []
            route = sender.bytes
            self._send(route, self._answer(route, peer_pid(sender), frames))
            self._pass_on_yields()

    def _answer(self, route: bytes, pid: int, frames: list[bytes]) -> list[bytes]:
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
            return _reply(seq, result)
        except KvdError as e:
            return error_reply(seq, e)
        except Exception as e:
            # A bug must not take the pages of every worker with it. `audit` tells what it did.
            log.exception("rpc.internal_error")
            return error_reply(seq, KvdError(f"internal error: {type(e).__name__}: {e}"))

    def _pass_on_yields(self) -> None:
        for pool in self._daemon.pools.values():
            while pool.cache.to_yield:
                request = pool.cache.to_yield.pop()
                attachment = self._daemon.attachments.get(request.session.id)
                if attachment is not None:
                    self._notify(attachment, "yield", request.number)

    def _notify(self, attachment: Attachment, kind: str, request: int) -> None:
        if attachment.route is not None:
            notice = {"v": PROTOCOL_VERSION, "notice": kind, "request": request}
            log.info("request.asked_to_yield", session=attachment.id, request=request)
            self._send(attachment.route, [msgpack.packb(notice)])

    def _send(self, route: bytes, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart([route, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as e:  # EHOSTUNREACH: it is gone. EAGAIN: it does not read.
            log.warning("rpc.reply_dropped", reason=str(e))


def peer_pid(frame: zmq.Frame) -> int:
    """The process that sent a frame, as the kernel told libzmq; 0 if it did not."""
    try:
        user_group_pid = str(frame.get("Peer-Address"))  # "localhost:0:0:4711"
        return int(user_group_pid.rpartition(":")[2])
    except (zmq.ZMQError, ValueError):
        return 0


def _reply(seq: int, result: dict[str, Any]) -> list[bytes]:
    writer = FrameWriter()
    if "results" in result:
        result = {"results": [_entry(entry, writer) for entry in result["results"]]}
    else:
        result = arrays_out(result, writer)
    return writer.message({"v": PROTOCOL_VERSION, "seq": seq, "result": result})


def _entry(entry: dict[str, Any], writer: FrameWriter) -> dict[str, Any]:
    return entry if "error" in entry else {"result": arrays_out(entry["result"], writer)}
