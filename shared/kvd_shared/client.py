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

import zmq

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.errors import DaemonTimeout, DaemonUnreachable, KvdError
from kvd_shared.lease import RPC_SOCKET, Attached, AttachRequest, PoolOffer, attach
from kvd_shared.mapping import PoolMapping
from kvd_shared.rpc import Notice, Reply, RpcCodec, read_reply

T = TypeVar("T")
DEFAULT_TIMEOUT_S = 5.0
# Plain integers: with pyzmq's enums each use costs a microsecond.
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)
LOOK_MS = 50  # between looks at whether the daemon still lives


class KvdClient:
    """One session with a daemon, for one thread.

    `pool` and `mapping` are the attached pool and its memory in this process (None for role
    admin). A forked child must attach by itself.
    """

    def __init__(self, socket_dir: Path, attached: Attached) -> None:
        """Use `attach`."""
        self.session = attached.session
        self.pool: PoolOffer | None = attached.pool
        self.mapping: PoolMapping | None = map_pool(attached)
        self._socket_dir = socket_dir
        self._connection = attached.connection
        self._connection.setblocking(False)
        self._codec = RpcCodec(attached.token)
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

    def call(self, call: Call[T], timeout_s: float = DEFAULT_TIMEOUT_S) -> T:
        """Do one operation. Raises the daemon's typed error; DaemonUnreachable when the daemon is
        gone, DaemonTimeout when it does not answer in time (what was asked may have been done)."""
        if os.getpid() != self._pid:
            raise DaemonUnreachable("this session belongs to the parent process: attach anew")
        seq, frames = self._codec.request(call)
        for frame in frames[:-1]:
            self._socket.send(frame, SNDMORE)
        self._socket.send(frames[-1])
        deadline = time.monotonic() + timeout_s
        while True:
            incoming = self._wait(deadline, call.op, timeout_s)
            if isinstance(incoming, Notice):
                self._notices.append(incoming)
            elif incoming.seq in (seq, 0):
                return read_reply(call, incoming)

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
        """False once the daemon has closed the session's lease connection."""
        return connection_open(self._connection)

    def close(self) -> None:
        """Unmap the pool and end the session; what it held comes back. Idempotent."""
        if self._socket.closed:
            return
        if self.mapping is not None:
            self.mapping.close()
        if os.getpid() == self._pid and self.alive:
            with suppress(KvdError):  # it is gone, and the session with it
                self.call(verbs.detach(), timeout_s=1.0)
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

    def _receive(self) -> Reply | Notice | None:
        try:
            return self._codec.incoming(receive(self._socket, NOBLOCK))
        except zmq.Again:
            return None

    def _wait(self, deadline: float, op: str, timeout_s: float) -> Reply | Notice:
        """The next message. A reply that is there wins over the daemon's end."""
        # Blocking is the quickest way; whether the daemon lives is looked at only now and then.
        slice_ms = min(LOOK_MS, max(1, int(timeout_s * 1000)))
        while True:
            if slice_ms != self._receive_ms:
                self._receive_ms = slice_ms
                self._socket.setsockopt(zmq.RCVTIMEO, slice_ms)
            with suppress(zmq.Again):
                return self._codec.incoming(receive(self._socket, 0))
            if not self.alive:
                raise DaemonUnreachable(f"the daemon at {self._socket_dir} went away during {op}")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DaemonTimeout(
                    f"the daemon at {self._socket_dir} did not answer {op} within {timeout_s} s"
                )
            slice_ms = max(1, min(LOOK_MS, int(left_s * 1000)))


def receive(socket: Any, flags: int) -> list[bytes]:
    """One message's frames. Raises zmq.Again."""
    frame = socket.recv(flags, False)
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(flags, False)
        frames.append(frame.bytes)
    return frames


def map_pool(attached: Attached) -> PoolMapping | None:
    """Map what was attached and close its fds, which the mapping does not need."""
    try:
        if attached.pool is None:
            return None
        total = attached.pool.num_pages * attached.pool.layout.page_bytes
        return PoolMapping.attach(attached.fds, attached.pool.chunk_bytes, total)
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
