"""ZeroMQ sockets that are bound to an endpoint of the configuration."""

from __future__ import annotations

from pathlib import Path

import zmq

from kvd.socket_files import made_private, share_with_group

FLUSH_MS = 500  # for the last messages, on closing


def bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Returns the address, with the port that the system chose where the endpoint leaves it open.

    Options of the socket come before. Raises OSError when the endpoint cannot be bound.
    """
    socket.setsockopt(zmq.LINGER, FLUSH_MS)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    try:
        with made_private():
            socket.bind(endpoint)
    except zmq.ZMQError as e:
        raise OSError(e.errno, f"cannot publish events on {endpoint}: {e.strerror}") from e
    if path := _ipc_path(endpoint):
        share_with_group(path)
    return str(socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")


def unbind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    socket.close()
    if path := _ipc_path(endpoint):
        path.unlink(missing_ok=True)


def _ipc_path(endpoint: str) -> Path | None:
    return Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
