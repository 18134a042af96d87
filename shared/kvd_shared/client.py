"""The synchronous client: attach to a daemon, map its pool, call its operations.

with KvdClient.attach(socket_dir, name="my-engine") as kvd:
    found = kvd.call(verbs.match(namespace, tokens))
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zmq

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.errors import DaemonTimeout, DaemonUnreachable, KvdError
from kvd_shared.fence import Fence
from kvd_shared.lease import RPC_SOCKET, Attached, AttachRequest, PoolOffer, attach, is_served
from kvd_shared.mapping import PoolMapping
from kvd_shared.refs import PageRefs
from kvd_shared.resume import declarations, lost_again, refuse_alive, resume
from kvd_shared.rpc import Notice, Reply, RpcCodec, read_reply

T = TypeVar("T")
DEFAULT_TIMEOUT_S = 5.0
# Plain integers: with pyzmq's enums each use costs a microsecond.
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)
LOOK_MS = 50  # between looks at whether the daemon still lives
DETACH_TIMEOUT_S = 1.0


class KvdClient:
    """One session with a daemon, for one thread.

    `pool` and `mapping` are the attached pool and its memory in this process (None for role
    admin). A forked child must attach by itself.

    When the daemon dies, calls raise DaemonUnreachable; the memory stays as it is. `resume` goes on
    with the next daemon. Whatever was read from the pool may be used only if `fenced` is still
    False after it was read.
    """

    def __init__(self, socket_dir: Path, attached: Attached) -> None:
        """Use `attach`."""
        self.session = attached.session
        self.pool: PoolOffer | None = attached.pool
        self.mapping, self._fence = map_attached(attached)
        self._socket_dir = socket_dir
        self._connection = attached.connection
        self._connection.setblocking(False)
        self._token = attached.token
        self._codec = RpcCodec(attached.token, attached.epoch)
        self._context = zmq.Context()
        self._socket = open_rpc_socket(self._context, socket_dir)
        self._receive_ms = -1  # the socket's RCVTIMEO
        self._notices: deque[Notice] = deque()
        self._pid = os.getpid()

    @classmethod
    def attach(
        cls,
        socket_dir: Path,
        *,
        name: str,
        role: str = "worker",
        pool: str | None = None,
        geometry: dict[str, int] | None = None,
        model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> KvdClient:
        """Attach under a name. See AttachRequest for the rest.

        Raises DaemonUnreachable (retryable), LayoutMismatch, UnknownPool, NotAllowed, Draining.
        """
        request = AttachRequest(
            role=role, name=name, pid=os.getpid(), pool=pool, geometry=geometry, model=model
        )
        return cls(socket_dir, attach(socket_dir, request, timeout_s))

    def call(
        self, call: Call[T], timeout_s: float = DEFAULT_TIMEOUT_S, *, seq: int | None = None
    ) -> T:
        """Do one operation. Raises the daemon's typed error; DaemonUnreachable when the daemon is
        gone (or StaleEpoch, if another one is there already), DaemonTimeout when it does not
        answer in time.

        What a daemon did not answer may have been done. With the `seq` of the DaemonTimeout's
        details the same call can be made again: it is done once, and this is its answer. Half way
        to the timeout that is done here, lest a lost answer cost the session.
        """
        if os.getpid() != self._pid:
            raise DaemonUnreachable("this session belongs to the parent process: attach anew")
        deadline = time.monotonic() + timeout_s
        number, frames = self._codec.request(call, int(deadline * 1000), seq)
        self._send(frames)
        try:
            return read_reply(call, self._answer(number, deadline - timeout_s / 2, call.op))
        except DaemonTimeout:
            self._send(frames)
        try:
            return read_reply(call, self._answer(number, deadline, call.op))
        except DaemonTimeout as e:
            raise DaemonTimeout(f"{e.message} within {timeout_s} s", seq=number) from None

    def resume(
        self, refs: npt.ArrayLike, counts: npt.ArrayLike, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> PageRefs:
        """Go on with the next daemon once `alive` is False: the same session, the same memory. The
        session holds `refs` (each page once), `counts` times each, in the tree or its own; own
        pages that are not named go free, and all others count as in use. Sequences, requests and
        what else had a number are forgotten.

        Returns those that it cannot have: what is in them is not to be used any more.

        Raises DaemonUnreachable while no daemon is there: try again, with what is held then.
        PoolLost (the daemon has started cold), SessionEnded (too late, or it is over) or
        NotAllowed: nothing can be used any more; `close`, and attach again.
        """
        if os.getpid() != self._pid:
            raise DaemonUnreachable("this session belongs to the parent process: attach anew")
        refuse_alive(self.alive)
        parts = list(declarations(refs, counts))
        connection, epoch = resume(
            self._socket_dir, self.session, self._token, self.epoch, self.pool, timeout_s
        )
        self._connection.close()
        self._connection = connection
        self._codec.epoch = epoch
        self._socket.close(linger=0)  # and with it what the old daemon has left unread
        self._socket = open_rpc_socket(self._context, self._socket_dir)
        self._receive_ms = -1
        self._notices.clear()
        try:
            return np.concatenate([self.call(part, timeout_s) for part in parts])
        except DaemonTimeout as e:
            self._connection.close()
            raise lost_again(e) from e

    def notices(self) -> list[Notice]:
        """What the daemon has said unasked since the last call. Does not wait."""
        while (incoming := self._receive()) is not None:
            if isinstance(incoming, Notice):
                self._notices.append(incoming)
        taken = list(self._notices)
        self._notices.clear()
        return taken

    @property
    def alive(self) -> bool:
        """False once the daemon has closed the session's lease connection, or is gone."""
        return connection_open(self._connection)

    @property
    def epoch(self) -> int:
        """Of the daemon's starts, the one that this session is with."""
        return self._codec.epoch

    @property
    def fenced(self) -> bool:
        """Whether pages that were held here may be another's by now: what has been read is not to
        be used; `close`, and attach again. One load; no daemon is asked. For role worker."""
        return self._fence is not None and self._fence.is_up

    def close(self) -> None:
        """Unmap the pool and end the session; what it held comes back. Idempotent."""
        if self._socket.closed:
            return
        if self.mapping is not None:
            self.mapping.close()
        if self._fence is not None:
            self._fence.close()
        if os.getpid() == self._pid and (self.alive or is_served(self._socket_dir)):
            self._detach()
        self._socket.close(linger=0)
        self._context.term()
        self._connection.close()

    def __enter__(self) -> KvdClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _detach(self) -> None:
        """Also a session that is over: the daemon then waits to hear that the pool is unmapped."""
        number, frames = self._codec.request(verbs.detach())
        with suppress(KvdError):  # it is gone, and the session with it
            self._send(frames)
            self._answer(number, time.monotonic() + DETACH_TIMEOUT_S, "detach", is_over=True)

    def _send(self, frames: list[bytes]) -> None:
        for frame in frames[:-1]:
            self._socket.send(frame, SNDMORE)
        self._socket.send(frames[-1])

    def _answer(self, seq: int, deadline: float, op: str, is_over: bool = False) -> Reply:
        slice_ms = min(LOOK_MS, max(1, int((deadline - time.monotonic()) * 1000)))
        while True:
            incoming = self._wait(deadline, op, is_over, slice_ms)
            if isinstance(incoming, Notice):
                self._notices.append(incoming)
            elif incoming.seq in (seq, 0):
                return incoming

    def _receive(self) -> Reply | Notice | None:
        try:
            return self._codec.incoming(receive(self._socket, NOBLOCK))
        except zmq.Again:
            return None

    def _wait(self, deadline: float, op: str, is_over: bool, slice_ms: int) -> Reply | Notice:
        """The next message. A reply that is there wins over the daemon's end."""
        # Blocking is the quickest way; whether the daemon lives is looked at only now and then.
        while True:
            if slice_ms != self._receive_ms:
                self._receive_ms = slice_ms
                self._socket.setsockopt(zmq.RCVTIMEO, slice_ms)
            with suppress(zmq.Again):
                return self._codec.incoming(receive(self._socket, 0))
            if not is_over and not self.alive:
                raise DaemonUnreachable(f"the daemon at {self._socket_dir} went away during {op}")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DaemonTimeout(f"the daemon at {self._socket_dir} did not answer {op}")
            slice_ms = max(1, min(LOOK_MS, int(left_s * 1000)))


def receive(socket: Any, flags: int) -> list[bytes]:
    """One message's frames. Raises zmq.Again."""
    frame = socket.recv(flags, False)
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(flags, False)
        frames.append(frame.bytes)
    return frames


def map_attached(attached: Attached) -> tuple[PoolMapping | None, Fence | None]:
    """Map what was attached and close its fds, which the mappings do not need."""
    try:
        fence = None
        if attached.pool is None:
            return None, None
        num_chunks = len(attached.pool.chunk_bytes)
        if attached.fence is not None and len(attached.fds) == num_chunks + 1:
            fence = Fence(attached.fds[-1], attached.fence)
        total = attached.pool.num_pages * attached.pool.layout.page_bytes
        chunks = attached.fds if fence is None else attached.fds[:-1]
        return PoolMapping.attach(chunks, attached.pool.chunk_bytes, total), fence
    except BaseException:
        attached.connection.close()
        raise
    finally:
        for fd in attached.fds:
            os.close(fd)


def open_rpc_socket(context: zmq.Context[Any], socket_dir: Path) -> zmq.Socket[Any]:
    """A DEALER to the daemon's ROUTER."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(f"ipc://{socket_dir / RPC_SOCKET}")
    return dealer


def connection_open(connection: socket.socket) -> bool:
    """Whether the other side of a lease connection still has it open."""
    try:
        return bool(connection.recv(1, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False
