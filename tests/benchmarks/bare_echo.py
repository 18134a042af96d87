"""The client's side of the bare echo (echo_server.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import zmq

from tests.benchmarks.echo_server import SIZES
from tests.daemon import child_environment


class BareEcho:
    """A DEALER whose messages are answered with as many bytes as kvd would answer."""

    def __init__(self, socket: zmq.Socket[Any], pid: int) -> None:
        self.pid = pid
        self._socket = socket
        self._frames: dict[int, list[bytes]] = {}

    def like(self, number: int, request: Sequence[bytes], reply: Sequence[bytes]) -> None:
        """Round trip `number` (0 or 1) has frames of these lengths from now on."""
        head, *raw = request
        start = str(number).encode()
        self._frames[number] = [start * len(head), *(b"x" * len(frame) for frame in raw)]
        sizes = ",".join(str(len(frame)) for frame in reply)
        self._socket.send(SIZES + start + b" " + sizes.encode())
        self._socket.recv_multipart()

    def round_trip(self, number: int = 0) -> None:
        self._socket.send_multipart(self._frames[number])
        self._socket.recv_multipart()


@contextmanager
def bare_echo() -> Iterator[BareEcho]:
    directory = tempfile.mkdtemp(prefix="kvd")
    address = f"ipc://{directory}/echo.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.echo_server", address],
        env=child_environment(),
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the echo server ended before it was ready")
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)
            yield BareEcho(socket, process.pid)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)
