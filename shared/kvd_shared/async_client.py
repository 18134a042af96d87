"""The asyncio client: the same calls as KvdClient's, any number of them under way at once."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import zmq.asyncio

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.client import (
    DEFAULT_TIMEOUT_S,
    connection_open,
    map_pool,
    open_rpc_socket,
)
from kvd_shared.errors import DaemonTimeout, DaemonUnreachable, KvdError
from kvd_shared.lease import Attached, AttachRequest, attach
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
        self.mapping = map_pool(attached)
        self.notices: asyncio.Queue[Notice] = asyncio.Queue()
        self._socket_dir = socket_dir
        self._connection = attached.connection
        self._connection.setblocking(False)
        self._codec = RpcCodec(attached.token)
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

    async def call(self, call: Call[T], timeout_s: float = DEFAULT_TIMEOUT_S) -> T:
        """As KvdClient.call. A cancelled call may have been done."""
        if not connection_open(self._connection):
            raise self._gone(call.op)
        seq, frames = self._codec.request(call)
        answer = self._waiting[seq] = self._loop.create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.send_multipart(frames)
                reply = await answer
        except TimeoutError as e:
            raise DaemonTimeout(
                f"the daemon at {self._socket_dir} did not answer {call.op} within {timeout_s} s"
            ) from e
        finally:
            del self._waiting[seq]
        return read_reply(call, reply)

    async def close(self) -> None:
        """Unmap the pool and end the session; what it held comes back. Idempotent."""
        if self._socket.closed:
            return
        if self.mapping is not None:
            self.mapping.close()
        with suppress(KvdError):  # it is gone, and the session with it
            await self.call(verbs.detach(), timeout_s=1.0)
        self._loop.remove_reader(self._connection)
        self._receiver.cancel()
        self._socket.close(linger=0)
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
