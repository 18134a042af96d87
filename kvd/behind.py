"""Messages that came behind a long request over the same connection: they are done in order."""

from __future__ import annotations

from collections import deque

from kvd.peers import Peer

MAX_WAITING = 1024  # messages of one connection
MAX_WAITING_BYTES = 32 << 20  # then no more; each may have as many


class Behind:
    """Invariant: `_bytes` is what the messages have."""

    __slots__ = ("_bytes", "messages")

    def __init__(self) -> None:
        self.messages: deque[tuple[Peer, list[bytes]]] = deque()
        self._bytes = 0

    def put(self, peer: Peer, frames: list[bytes]) -> bool:
        """Whether there was room."""
        if len(self.messages) >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES:
            return False
        self.messages.append((peer, frames))
        self._bytes += sum(map(len, frames))
        return True

    def take(self) -> tuple[Peer, list[bytes]]:
        peer, frames = self.messages.popleft()
        self._bytes -= sum(map(len, frames))
        return peer, frames
