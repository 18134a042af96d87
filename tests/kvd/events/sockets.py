"""A publisher on the test's own loop, and consumers' sockets, all over ipc."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from kvd.events.log import EventLog
from kvd.events.options import EventsOptions
from kvd.events.publisher import Publisher

PATIENCE_S = 20.0
LAST = b"\xff" * 8  # sequence number -1
Frames = list[bytes]


@contextmanager
def publishing(
    log: EventLog, folder: Path, *, heartbeat_s: float = 0.0, hwm: int = 100_000, topic: str = "kv"
) -> Iterator[Publisher]:
    options = EventsOptions(
        endpoint=f"ipc://{folder}/live",
        replay_endpoint=f"ipc://{folder}/replay",
        topic=topic,
        hwm=hwm,
        heartbeat_s=heartbeat_s,
    )
    publisher = Publisher(log, options, asyncio.get_running_loop())
    try:
        yield publisher
    finally:
        publisher.close()


@contextmanager
def consumer(kind: int, folder: Path, receive_hwm: int = 100_000) -> Iterator[zmq.Socket[bytes]]:
    """A SUB socket on the stream, or another on the replay endpoint."""
    context = zmq.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.RCVHWM, receive_hwm)
    socket.setsockopt(zmq.RECONNECT_IVL, 5)
    if kind == zmq.SUB:
        socket.subscribe(b"")
    socket.connect(f"ipc://{folder}/{'live' if kind == zmq.SUB else 'replay'}")
    try:
        yield socket
    finally:
        context.destroy(linger=0)


async def receive(socket: zmq.Socket[bytes]) -> Frames:
    """The next message; the publisher runs meanwhile."""
    await until(lambda: bool(socket.poll(0)))
    return socket.recv_multipart()


async def until(condition: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "nothing happens any more"
        await asyncio.sleep(0.001)


async def answers(socket: zmq.Socket[bytes], request: bytes) -> list[Frames]:
    """Ask as a DEALER does, and collect the answer's messages, the last one included."""
    socket.send_multipart([b"", request])
    messages: list[Frames] = []
    while not messages or messages[-1][1] != LAST:
        empty, *message = await receive(socket)
        assert empty == b"" and len(message) == 3
        messages.append(message)
    return messages
