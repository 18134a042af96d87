"""The RPC channel's daemon side: a ROUTER drained from the event loop.

A plain ZeroMQ socket, not zmq.asyncio, which costs a third of a round trip; the loop calls its
turns (see serving_loop.py). Its file descriptor is edge-triggered, so every turn reads until
nothing is left or hands over to another turn.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgpack
import structlog
import zmq

from kvd.arguments import MAX_ARRAY_BYTES
from kvd.behind import Behind
from kvd.chores import Chores
from kvd.daemon import Attachment, Daemon
from kvd.dispatch import perform
from kvd.peers import Peer, Peers
from kvd.report_parts import Sliced
from kvd.socket_files import made_private, share_with_group
from kvd_shared.calls import arrays_out
from kvd_shared.errors import (
    BadRequest,
    Busy,
    DeadlineExceeded,
    KvdError,
    NotAllowed,
    SessionEnded,
    StaleEpoch,
    TooLarge,
    Undeclared,
    brief,
)
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
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES + MAX_ARRAY_BYTES + (1 << 20)  # all of a message's frames
RECEIVE_HWM = 8  # messages of one peer that ZeroMQ takes in ahead: prompts have 4 MiB, some 64 MiB

# Plain integers: with pyzmq's enums each use costs a microsecond.
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)

log = structlog.get_logger()
_HEADER = {"v", "epoch", "session", "seq", "deadline_ms", "op", "args"}


class RpcServer:
    """Answers every message that has a sender, with its result or a typed error."""

    def __init__(self, daemon: Daemon, socket_dir: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._daemon, self._loop = daemon, loop
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error here
        self._path = socket_dir / RPC_SOCKET
        try:
            with made_private():
                self._socket.bind(f"ipc://{self._path}")
        except zmq.ZMQError as e:
            raise OSError(e.errno, f"cannot listen on {self._path}: {e.strerror}") from e
        share_with_group(self._path)
        self._peers = Peers()
        self._under_way: dict[bytes, Behind] = {}  # by route, while a long request of it is
        self._ignored = daemon.breaches.ignored
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
                route, frames, size = sender.bytes, [], 0
                while frame.more:
                    frame = socket.recv(NOBLOCK, False)
                    size += len(frame)
                    if size <= MAX_MESSAGE_BYTES:
                        frames.append(frame.bytes)
                peer = self._peers.of(route, sender)
                if size <= MAX_MESSAGE_BYTES:
                    self._handle(route, peer, frames)
                else:
                    self._breach(route, peer)
                    self._send(route, self._refusal(None, 0, _too_large(size)))
                done = not socket.getsockopt(EVENTS) & POLLIN
                if done or time.monotonic() >= end:
                    break
            if not done:
                self._loop.call_soon(self.turn)
        finally:
            self._chores.wake()

    def _handle(self, route: bytes, peer: Peer, frames: list[bytes]) -> None:
        """Answer a message, after those that came before it from the same peer."""
        if self._ignored and (route, peer) in self._ignored:
            self._daemon.breaches.num_dropped += 1
            return
        waiting = self._under_way.get(route)
        if waiting is None:
            answer = self._answer(route, peer, frames)
        elif waiting.put(peer, frames):
            return
        else:
            answer = self._refusal(
                None, 0, Busy("too many messages wait behind a long request of this connection")
            )
        if answer is not None:
            self._send(route, answer)
        self.pass_on_notices()

    def _answer(self, route: bytes, peer: Peer, frames: list[bytes]) -> list[bytes] | None:
        """The answer, or None if it comes later: the request is done in slices."""
        seq, attachment, header = 0, None, dict[str, Any]()
        try:
            header = read_header(frames)
            epoch = header.get("epoch")
            if type(header.get("seq")) is int and header["seq"] > 0:
                seq = header["seq"]
            if not seq or header.keys() != _HEADER or type(epoch) is not int:
                raise BadRequest(f"a request's header has exactly {sorted(_HEADER)}, seq from 1")
            detaching = header["op"] == "detach"
            found = self._daemon.attachment(header["session"], *peer, ended_too=detaching)
            if found.route != route or not route.startswith(b"\0"):
                self._daemon.vouch(found)  # a connection not seen before
                found.route = route
            attachment = found
            if epoch != attachment.epoch and not detaching:
                raise StaleEpoch(
                    f"epoch {brief(epoch)}; this session is in {attachment.epoch}: resume",
                    epoch=epoch,
                    current=attachment.epoch,
                )
            if not attachment.window.is_new(seq) and not detaching:
                return attachment.window.again(seq, route)
        except Exception as e:
            if attachment is None:
                self._breach(route, peer)
            return self._refused(e, seq, attachment, peer, header)
        try:
            answer = self._do(attachment, route, seq, header, frames)
        except Exception as e:
            answer = self._refused(e, seq, attachment, peer, header)
        if answer is not None:  # whatever it is, it is the one outcome of this number
            attachment.window.done(seq, answer)
        return answer

    def _do(
        self,
        attachment: Attachment,
        route: bytes,
        seq: int,
        header: dict[str, Any],
        frames: list[bytes],
    ) -> list[bytes] | None:
        now, deadline_ms = time.monotonic(), header["deadline_ms"]
        if type(deadline_ms) is not int or deadline_ms < 0:
            raise BadRequest(f"deadline_ms {brief(deadline_ms)}: a whole number, or 0 for none")
        if deadline_ms and deadline_ms < now * 1000:
            raise DeadlineExceeded(
                f"the request was taken up {now * 1000 - deadline_ms:.0f} ms after its deadline; "
                "nothing was done: ask again, and wait longer where the daemon is that busy"
            )
        if attachment.declaring and header["op"] not in ("declare", "detach"):
            raise Undeclared(
                "this session has resumed: it declares what it holds before anything else"
            )
        result = perform(self._daemon, attachment, header["op"], header["args"], frames, now)
        if isinstance(result, dict):
            return self._reply(attachment, seq, result)
        if attachment.role == "admin":  # before anything is done
            self._chores.check_room()
        done = _slice(result)  # most need no second one
        if done is not None:
            return self._reply(attachment, seq, done)
        self._under_way[route] = Behind()
        attachment.window.begun(seq, route)
        self._chores.add(result, lambda job: self._advance(job, attachment, route, seq))
        return None

    def _advance(self, job: Sliced, attachment: Attachment, route: bytes, seq: int) -> bool:
        """One slice of a request; the last one answers it, and what has come behind it."""
        try:
            result = _slice(job)
            if result is None:
                return True
            answer = self._reply(attachment, seq, result)
        except Exception as e:
            answer = self._refusal(attachment, seq, e)
        self._send(attachment.window.ended(seq, answer), answer)
        self.pass_on_notices()
        waiting = self._under_way.pop(route)
        while waiting.messages:
            self._handle(route, *waiting.take())
            if route in self._under_way:  # that one is long, too
                self._under_way[route] = waiting
                break
        return False

    def _breach(self, route: bytes, peer: Peer) -> None:
        """One message more of a connection that makes no sense, or is of nobody."""
        if not self._daemon.breaches.note((route, peer)):
            return
        log.warning("rpc.ignored", pid=peer[0], uid=peer[1],
                    why="too many messages that make no sense",
                    effect="no more of this connection is answered")  # fmt: skip
        for attachment in list(self._daemon.attachments.values()):
            if attachment.route == route:
                self._daemon.end_session(attachment, "senseless", time.monotonic())

    def _refused(
        self,
        error: Exception,
        seq: int,
        attachment: Attachment | None,
        peer: Peer,
        header: dict[str, Any],
    ) -> list[bytes]:
        if isinstance(error, NotAllowed | SessionEnded):
            self._daemon.refusals.note(
                error,
                channel="rpc",
                pid=peer[0],
                uid=peer[1],
                role=attachment.role if attachment else None,
                op=brief(header.get("op")),
            )
        return self._refusal(attachment, seq, error)

    def _refusal(self, attachment: Attachment | None, seq: int, error: Exception) -> list[bytes]:
        if not isinstance(error, KvdError):
            # A bug must not take the pages of every worker with it. `audit` tells what it did.
            log.error("rpc.internal_error", exc_info=error)
            error = KvdError(f"internal error: {type(error).__name__}: {error}")
        self._daemon.refused[error.code] += 1
        epoch = self._daemon.epoch if attachment is None else attachment.epoch
        return error_reply(epoch, seq, error)

    def _reply(self, attachment: Attachment, seq: int, result: dict[str, Any]) -> list[bytes]:
        writer = FrameWriter(MAX_INLINE_BYTES)
        if "results" in result:
            result = {"results": [self._entry(entry, writer) for entry in result["results"]]}
        else:
            result = arrays_out(result, writer)
        return writer.message(
            {"v": PROTOCOL_VERSION, "epoch": attachment.epoch, "seq": seq, "result": result}
        )

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


def _too_large(size: int) -> TooLarge:
    return TooLarge(
        f"a message of {size} bytes is over the limit of {MAX_MESSAGE_BYTES}: split it",
        size=size,
        limit=MAX_MESSAGE_BYTES,
    )


def _slice(job: Sliced) -> dict[str, Any] | None:
    """One slice more: the result if it was the last."""
    try:
        next(job)
    except StopIteration as e:
        result: dict[str, Any] = e.value
        return result
    return None
