"""The lease socket: how a process attaches, and how each side notices that the other is gone.

One AF_UNIX SEQPACKET connection a session. The client sends one packet, the daemon answers with
one, to which the pool's fds are attached (SCM_RIGHTS). After that nothing is said: the connection
stays open for the session's life, and its end of file is the news. resume.py has the packet with
which a session goes on with the next daemon.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from kvd_shared.errors import (
    BadRequest,
    DaemonTimeout,
    DaemonUnreachable,
    TooLarge,
    brief,
    error_from_wire,
)
from kvd_shared.layout import PoolLayout
from kvd_shared.wire import MAX_ATTACH_BYTES, PROTOCOL_VERSION, read_map

LEASE_SOCKET = "lease.sock"
RPC_SOCKET = "rpc.sock"
MAX_FDS = 65  # a pool's chunks, and its metadata
MAX_NAME_CHARACTERS = 64
MAX_TEXT_CHARACTERS = 256
ROLES = ("worker", "admin", "observer")
GEOMETRY = ("num_layers", "num_kv_heads", "head_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """Who attaches and what it expects. Role worker gets a pool; `pool` None means the only one,
    or the only one of that `model`. `geometry` and `model` are checked against the pool's."""

    role: str
    name: str
    pid: int
    pool: str | None = None
    geometry: dict[str, int] | None = None
    model: str | None = None

    def to_wire(self) -> bytes:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return msgpack.packb({"v": PROTOCOL_VERSION, "op": "attach", **fields})

    @classmethod
    def from_wire(cls, raw: bytes) -> AttachRequest:
        packet = read_map(raw)
        names = {"v", "op", *cls.__slots__}
        if packet.get("op") != "attach" or set(packet) != names:
            raise BadRequest(f"an attach packet is a map with exactly {sorted(names)}")
        request = cls(**{name: packet[name] for name in cls.__slots__})
        request.check()
        return request

    def check(self) -> None:
        if self.role not in ROLES:
            raise BadRequest(f"role {brief(self.role)}: must be one of {', '.join(ROLES)}")
        _check_text("name", self.name, MAX_NAME_CHARACTERS)
        check_pid(self.pid)
        for field in ("pool", "model"):
            if (value := getattr(self, field)) is not None:
                _check_text(field, value, MAX_TEXT_CHARACTERS)
        geometry = self.geometry
        if geometry is not None and (
            not isinstance(geometry, dict)
            or set(geometry) != set(GEOMETRY)
            or not all(type(v) is int for v in geometry.values())
        ):
            raise BadRequest(
                f"geometry {brief(geometry)}: must be nil or a map of numbers {GEOMETRY}"
            )


def check_pid(pid: Any) -> None:
    if type(pid) is not int or pid < 1:
        raise BadRequest(f"pid {brief(pid)}: must be a positive number")


def _check_text(field: str, value: Any, longest: int) -> None:
    """Refuses what is not fit for logs and terminals."""
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise BadRequest(
            f"{field} {brief(value)}: must be a string of 1 to {longest} printable characters"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOffer:
    """A pool as the daemon hands it out. `pool_id` names this physical memory."""

    name: str
    pool_id: str
    layout: PoolLayout
    num_pages: int
    model: str | None
    chunk_bytes: list[int]

    def to_wire(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"layout": self.layout.to_wire()}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> PoolOffer:
        return cls(**(wire | {"layout": PoolLayout.from_wire(wire["layout"])}))


@dataclass(frozen=True, slots=True)
class FenceOffer:
    """Where a worker sees that it must stop: the session may go on while the 8 bytes at `offset` of
    the metadata, as a native number, are `live_word`."""

    offset: int
    live_word: int

    def to_wire(self) -> dict[str, int]:
        return {"offset": self.offset, "live_word": self.live_word}

    @classmethod
    def from_wire(cls, wire: dict[str, int]) -> FenceOffer:
        return cls(**wire)


@dataclass(frozen=True, slots=True)
class Attached:
    """An accepted attach, on the client's side. The fds are the caller's to close: the pool's
    chunks, and behind them the metadata's if there is a fence."""

    connection: socket.socket
    session: int
    token: bytes
    epoch: int
    pool: PoolOffer | None
    fence: FenceOffer | None
    fds: list[int]


def attach(socket_dir: Path, request: AttachRequest, timeout_s: float) -> Attached:
    """Connect and attach. Raises DaemonUnreachable, or the error that the daemon answers."""
    connection, answer, fds = exchange(socket_dir, request.to_wire(), timeout_s)
    try:
        return Attached(
            connection,
            answer["session"],
            answer["token"],
            answer["epoch"],
            PoolOffer.from_wire(answer["pool"]) if answer["pool"] is not None else None,
            FenceOffer.from_wire(answer["fence"]) if answer["fence"] is not None else None,
            fds,
        )
    except (KeyError, TypeError) as e:
        _close(connection, fds)
        raise BadRequest(
            f"the daemon's answer in {socket_dir} is not that of an attach: {e}"
        ) from e


def exchange(
    socket_dir: Path, packet: bytes, timeout_s: float
) -> tuple[socket.socket, dict[str, Any], list[int]]:
    """Connect, and send the one packet that is sent: the connection, which is the session's from
    now on, the answer and the fds that came with it. Raises DaemonUnreachable, or the error that
    the daemon answers."""
    path = socket_dir / LEASE_SOCKET
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    fds: list[int] = []
    try:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(path))
        connection.send(packet)
        raw, fds, flags, _ = socket.recv_fds(
            connection, MAX_ATTACH_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC
        )
        return connection, _read_answer(path, raw, flags), list(fds)
    except BaseException as e:
        _close(connection, fds)
        if isinstance(e, TimeoutError):
            raise DaemonTimeout(f"the daemon at {path} did not answer within {timeout_s} s") from e
        if isinstance(e, OSError):
            raise DaemonUnreachable(f"no daemon answers at {path}: {e.strerror or e}") from e
        raise


def is_served(socket_dir: Path) -> bool:
    """Whether a daemon listens there now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
        connection.setblocking(False)
        return connection.connect_ex(os.fspath(socket_dir / LEASE_SOCKET)) == 0


def _close(connection: socket.socket, fds: list[int]) -> None:
    connection.close()
    for fd in fds:
        os.close(fd)


def _read_answer(path: Path, raw: bytes, flags: int) -> dict[str, Any]:
    if not raw:
        raise DaemonUnreachable(f"the daemon at {path} closed the connection unanswered")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise TooLarge(f"the daemon's answer is over {MAX_ATTACH_BYTES} bytes or {MAX_FDS} fds")
    reply = read_map(raw)
    if "error" in reply:
        raise error_from_wire(reply["error"])
    return reply


def accepted(
    session: int, token: bytes, epoch: int, pool: PoolOffer | None, fence: FenceOffer | None
) -> bytes:
    """The daemon's answer to an attach."""
    return msgpack.packb(
        {
            "v": PROTOCOL_VERSION,
            "session": session,
            "token": token,
            "epoch": epoch,
            "pool": pool.to_wire() if pool is not None else None,
            "fence": fence.to_wire() if fence is not None else None,
        }
    )


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the peer as this process's namespaces see them; pid 0: it is not seen."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid
