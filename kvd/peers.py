"""Whose connection a ZeroMQ route is, as the kernel told libzmq."""

from __future__ import annotations

import zmq

MAX_ROUTES = 4096  # remembered

Peer = tuple[int, int]  # pid and uid
NOBODY: Peer = (0, -1)


class Peers:
    """Asks libzmq once a connection: that takes some microseconds."""

    def __init__(self) -> None:
        self._by_route: dict[bytes, Peer] = {}

    def of(self, route: bytes, sender: zmq.Frame) -> Peer:
        """The process at the other end. Routes that libzmq itself gave (they begin with a zero
        byte, which no client's own may) are never another one's."""
        peer = self._by_route.get(route)
        if peer is None:
            peer = _read(sender)
            if route.startswith(b"\0"):
                if len(self._by_route) >= MAX_ROUTES:
                    self._by_route.clear()
                self._by_route[route] = peer
        return peer


def _read(frame: zmq.Frame) -> Peer:
    try:
        _, uid, _, pid = str(frame.get("Peer-Address")).rsplit(":", 3)  # "localhost:0:0:4711"
        return int(pid), int(uid)
    except (zmq.ZMQError, ValueError):
        return NOBODY
