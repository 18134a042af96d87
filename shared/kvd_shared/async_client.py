"""The asyncio client: the same calls as KvdClient's, any number of them under way at once."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zmq.asyncio

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.client import (
    DEFAULT_TIMEOUT_S,
    DETACH_TIMEOUT_S,
    connection_open,
    map_attached,
    open_rpc_socket,
)
from kvd_shared.errors import DaemonTimeout, DaemonUnreachable, KvdError
from kvd_shared.lease import Attached, AttachRequest, attach, is_served
from kvd_shared.refs import PageRefs
from kvd_shared.resume import declarations, lost_again, refuse_alive, resume
from kvd_shared.rpc import Notice, Reply, RpcCodec, read_reply

T = TypeVar("T")


class AsyncKvdClient:
    """One session with a daemon, for one event loop. See KvdClient for what the fields mean.

    `notices` holds what the daemon says unasked.
    """

    def __init__(self, socket_dir: Path, attached: Attached) -> None:
        """Use `attach`, inside the running loop."""
        self.session = attached.session
        self.pool = attached.pool
        self.mapping, self._fence = map_attached(attached)
        self.notices: asyncio.Queue[Notice] = asyncio.Queue()
        self._socket_dir = socket_dir
        self._connection = attached.connection
        self._connection.setblocking(False)
        self._token = attached.token
        self._codec = RpcCodec(attached.token, attached.epoch)
        self._context = zmq.asyncio.Context()
        # Any: pyzmq's types do not say that an asyncio context makes asyncio sockets
        self._socket: Any = open_rpc_socket(self._context, socket_dir)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._loop = asyncio.get_running_loop()
        self._receiver = self._loop.create_task(self._receive())
        self._loop.add_reader(self._connection, self._lease_readable)

    @classmethod
    async def attach(
        cls,
        socket_dir: Path,
        *,
        name: str,
        role: str = "worker",
        pool: str | None = None,
        geometry: dict[str, int] | None = None,
        model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> AsyncKvdClient:
        """As KvdClient.attach."""
        request = AttachRequest(
            role=role, name=name, pid=os.getpid(), pool=pool, geometry=geometry, model=model
        )
        return cls(socket_dir, await asyncio.to_thread(attach, socket_dir, request, timeout_s))

    @property
    def alive(self) -> bool:
        """As KvdClient.alive."""
        return connection_open(self._connection)

    @property
    def epoch(self) -> int:
        """As KvdClient.epoch."""
        return self._codec.epoch

    @property
    def fenced(self) -> bool:
        """As KvdClient.fenced."""
        return self._fence is not None and self._fence.is_up

    async def call(
        self, call: Call[T], timeout_s: float = DEFAULT_TIMEOUT_S, *, seq: int | None = None
    ) -> T:
        """As KvdClient.call. A cancelled call may have been done."""
        if not self.alive:
            raise self._gone(call.op)
        return await self._call(call, timeout_s, seq)

    async def resume(
        self, refs: npt.ArrayLike, counts: npt.ArrayLike, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> PageRefs:
        """As KvdClient.resume; no call may be under way. `notices` is emptied."""
        refuse_alive(self.alive)
        parts = list(declarations(refs, counts))
        connection, epoch = await asyncio.to_thread(
            resume,
            self._socket_dir,
            self.session,
            self._token,
            self.epoch,
            self.pool,
            timeout_s,
        )
        self._loop.remove_reader(self._connection)
        self._connection.close()
        self._connection = connection
        self._codec.epoch = epoch
        await self._close_socket()  # and with it what the old daemon has left unread
        self._fail_all(self._gone("a call"))
        self._socket = open_rpc_socket(self._context, self._socket_dir)
        while not self.notices.empty():
            self.notices.get_nowait()
        self._receiver = self._loop.create_task(self._receive())
        self._loop.add_reader(connection, self._lease_readable)
        try:
            return np.concatenate([await self.call(part, timeout_s) for part in parts])
        except DaemonTimeout as e:
            self._loop.remove_reader(connection)
            connection.close()
            raise lost_again(e) from e

    async def close(self) -> None:
        """Unmap the pool and end the session; what it held comes back. Idempotent."""
        if self._socket.closed:
            return
        if self.mapping is not None:
            self.mapping.close()
        if self._fence is not None:
            self._fence.close()
        if self.alive or is_served(self._socket_dir):
            with suppress(KvdError):  # it is gone, and the session with it
                await self._call(verbs.detach(), DETACH_TIMEOUT_S)
        if self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection)
        await self._close_socket()
        self._context.term()
        self._connection.close()

    async def __aenter__(self) -> AsyncKvdClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(self, call: Call[T], timeout_s: float, seq: int | None = None) -> T:
        deadline = time.monotonic() + timeout_s
        number, frames = self._codec.request(call, int(deadline * 1000), seq)
        answer = self._waiting[number] = self._loop.create_future()
        again = self._loop.call_later(timeout_s / 2, self._send_again, frames)
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.send_multipart(frames)
                reply = await answer
        except TimeoutError as e:
            raise DaemonTimeout(
                f"the daemon at {self._socket_dir} did not answer {call.op} within {timeout_s} s",
                seq=number,
            ) from e
        finally:
            again.cancel()
            self._waiting.pop(number, None)
        return read_reply(call, reply)

    def _send_again(self, frames: list[bytes]) -> None:
        """Half of the time is over. If it is not the daemon that is slow, the answer is lost."""
        if not self._socket.closed:
            self._socket.send_multipart(frames)  # a future that nobody needs

    async def _close_socket(self) -> None:
        self._receiver.cancel()
        await asyncio.wait([self._receiver])
        self._socket.close(linger=0)

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                incoming = self._codec.incoming(frames)
            except KvdError as e:  # a daemon of another release: nobody gets an answer
                self._fail_all(e)
                continue
            if isinstance(incoming, Notice):
                self.notices.put_nowait(incoming)
                continue
            answer = self._waiting.get(incoming.seq)
            if answer is not None and not answer.done():
                answer.set_result(incoming)

    def _lease_readable(self) -> None:
        if connection_open(self._connection):
            return
        self._loop.remove_reader(self._connection)
        self._fail_all(self._gone("a call"))

    def _fail_all(self, error: KvdError) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)

    def _gone(self, op: str) -> DaemonUnreachable:
        return DaemonUnreachable(f"the daemon at {self._socket_dir} went away during {op}")
