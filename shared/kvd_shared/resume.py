"""How a session goes on with a daemon that has restarted: the packets on the lease socket, and what
of the pages is declared in which part.

The process shows the token of its session; the daemon knows it by its digest, and the process by
its id and start time. What the session holds, only the process knows: it declares it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgpack
import numpy as np
import numpy.typing as npt

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.errors import BadRequest, DaemonUnreachable, SessionEnded, brief
from kvd_shared.lease import PoolOffer, check_pid, exchange
from kvd_shared.refs import PageRefs
from kvd_shared.verbs import MAX_DECLARED
from kvd_shared.wire import PROTOCOL_VERSION, TOKEN_LENGTH, read_map

POOL_ID_CHARACTERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    """Whose session it is, and of which pool and epoch it was until now."""

    token: bytes
    epoch: int
    pool_id: str
    pid: int
    role: ClassVar[str] = "worker"  # others have nothing to resume

    def to_wire(self) -> bytes:
        fields = {name: getattr(self, name) for name in _FIELDS}
        return msgpack.packb({"v": PROTOCOL_VERSION, "op": "resume", **fields})

    @classmethod
    def from_wire(cls, raw: bytes) -> ResumeRequest:
        packet = read_map(raw)
        names = {"v", "op", *_FIELDS}
        if packet.get("op") != "resume" or set(packet) != names:
            raise BadRequest(f"a resume packet is a map with exactly {sorted(names)}")
        request = cls(**{name: packet[name] for name in _FIELDS})
        request._check()
        return request

    def _check(self) -> None:
        if not isinstance(self.token, bytes) or len(self.token) != TOKEN_LENGTH:
            raise BadRequest(f"token: must be {TOKEN_LENGTH} bytes")
        if type(self.epoch) is not int or self.epoch < 1:
            raise BadRequest(f"epoch {brief(self.epoch)}: must be a positive number")
        if not isinstance(self.pool_id, str) or len(self.pool_id) != POOL_ID_CHARACTERS:
            raise BadRequest(
                f"pool_id {brief(self.pool_id)}: must have {POOL_ID_CHARACTERS} digits"
            )
        check_pid(self.pid)


_FIELDS = ("token", "epoch", "pool_id", "pid")


def resumed(session: int, epoch: int, pool_id: str) -> bytes:
    """The daemon's answer to a resume that it admits."""
    return msgpack.packb(
        {"v": PROTOCOL_VERSION, "session": session, "epoch": epoch, "pool_id": pool_id}
    )


def resume(
    socket_dir: Path,
    session: int,
    token: bytes,
    epoch: int,
    pool: PoolOffer | None,
    timeout_s: float,
) -> tuple[socket.socket, int]:
    """The session's new connection and epoch. Raises DaemonUnreachable while no daemon is there,
    PoolLost, SessionEnded, NotAllowed."""
    if pool is None:
        raise SessionEnded("only a worker's session outlives the daemon: attach again")
    request = ResumeRequest(token=token, epoch=epoch, pool_id=pool.pool_id, pid=os.getpid())
    connection, answer, fds = exchange(socket_dir, request.to_wire(), timeout_s)
    for fd in fds:
        os.close(fd)
    if answer.get("session") != session or answer.get("pool_id") != pool.pool_id:
        connection.close()
        raise BadRequest(f"the daemon's answer in {socket_dir} is not that of this resume")
    connection.setblocking(False)
    return connection, answer["epoch"]


def declarations(refs: npt.ArrayLike, counts: npt.ArrayLike) -> Iterator[Call[PageRefs]]:
    """All that is to be said before anything else, in parts; the last one is `done`."""
    pages, times = np.asarray(refs, dtype=np.int64), np.asarray(counts, dtype=np.int32)
    if pages.shape != times.shape or pages.ndim != 1:
        raise BadRequest(f"pages of shape {pages.shape}, counts of {times.shape}: one each a page")
    if len(np.unique(pages)) != len(pages):
        raise BadRequest("a page is named twice: say how often it is held instead")
    for start in range(0, max(1, len(pages)), MAX_DECLARED):
        end = start + MAX_DECLARED
        yield verbs.declare(pages[start:end], times[start:end], end >= len(pages))


def refuse_alive(alive: bool) -> None:
    """Raises BadRequest while the daemon is there: there is nothing to resume."""
    if alive:
        raise BadRequest("the daemon is there, and the session with it: nothing to resume")


def lost_again(error: DaemonUnreachable) -> SessionEnded:
    """The daemon lives and did not answer a declaration: what it has of it is not known."""
    return SessionEnded(f"resuming was cut short, {error.message}: attach again")
