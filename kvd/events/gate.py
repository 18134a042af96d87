"""Who may read the events of a pool that has keys: answers libzmq's question at each handshake.

libzmq asks a socket at a fixed address of its context (ZAP, ZeroMQ's RFC 27): seven frames with the
client's public key last, six frames back. Until it has an answer, it lets nobody in.
"""

from __future__ import annotations

import asyncio
import time

import zmq
from zmq.utils import z85

from kvd.events.keys import ServerKeys
from kvd.refusals import Refusals
from kvd_shared.errors import NotAllowed

ADDRESS = "inproc://zeromq.zap.01"
VERSION = b"1.0"
SHOWN_OF_KEY = 8  # characters
HANDSHAKE_BYTES = 4096  # a frame of CURVE's handshake is less
Context = zmq.Context[zmq.Socket[bytes]]


class Gate:
    """Make it before the sockets of its context that are to be guarded; close it behind them."""

    def __init__(self, context: Context, keys: ServerKeys, loop: asyncio.AbstractEventLoop) -> None:
        self.refusals = Refusals(time.monotonic)
        self._keys, self._loop = keys, loop
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ADDRESS)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._turn)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Before it is bound: from then on it speaks CURVE, and to nobody without it."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, b"events")
        limit = int(socket.getsockopt(zmq.MAXMSGSIZE))
        if 0 <= limit < HANDSHAKE_BYTES:  # it holds for the handshake, too
            socket.setsockopt(zmq.MAXMSGSIZE, HANDSHAKE_BYTES)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close()

    def _turn(self) -> None:
        """The descriptor has edges only: answers until nobody asks."""
        while not self._socket.closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._socket.send_multipart(self._answer(self._socket.recv_multipart()))

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        request = frames[1] if len(frames) > 1 else b""
        if len(frames) == 7 and frames[0] == VERSION and frames[5] == b"CURVE":
            if frames[6] in self._keys.clients:
                return [VERSION, request, b"200", b"OK", b"", b""]
            key = z85.encode(frames[6]).decode()[:SHOWN_OF_KEY]
            why = f"the public key {key}... is not in client_keys"
        else:
            why = "the client does not speak CURVE"
        address = frames[3].decode(errors="replace") if len(frames) > 3 else "?"
        self.refusals.note(NotAllowed(why, reason="unknown_key"), channel="events", uid=-1, pid=0,
                           role=None, address=address)  # fmt: skip
        return [VERSION, request, b"400", b"not allowed", b"", b""]
