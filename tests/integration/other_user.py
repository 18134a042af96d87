"""Processes of other users, for tests. Only root can make them."""

from __future__ import annotations

import itertools
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from kvd_shared.lease import LEASE_SOCKET, RPC_SOCKET, AttachRequest
from kvd_shared.wire import MAX_ATTACH_BYTES
from tests.daemon import RunningDaemon

STRANGER = 61_234  # a user, and a group, that this host does not have
OTHER = 61_235
GROUP = 61_300  # of the sockets
TIMEOUT_MS = 5000
_SEQS = itertools.count(1000)  # as no client of these sessions numbers

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def become(uid: int, gid: int, groups: tuple[int, ...] = ()) -> None:
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def attach_raw(socket_dir: Path, role: str, **fields: Any) -> tuple[dict[str, Any], int]:
    """The daemon's answer to an attach, and how many descriptors came with it (closed here)."""
    request = AttachRequest(role=role, name="raw", pid=os.getpid()).to_wire()
    if fields:
        request = msgpack.packb(msgpack.unpackb(request) | fields)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(TIMEOUT_MS / 1000)
        connection.connect(str(socket_dir / LEASE_SOCKET))
        connection.send(request)
        raw, fds, _, _ = socket.recv_fds(connection, MAX_ATTACH_BYTES, 64)
        for fd in fds:
            os.close(fd)
    return msgpack.unpackb(raw), len(fds)


def ask_raw(socket_dir: Path, token: bytes, op: str, args: dict[str, Any]) -> dict[str, Any]:
    """The daemon's answer to one request of this process under any token."""
    header = {"v": 1, "epoch": 1, "session": token, "seq": next(_SEQS), "deadline_ms": 0}
    header |= {"op": op, "args": args}
    context = zmq.Context()
    with context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{socket_dir / RPC_SOCKET}")
        dealer.send(msgpack.packb(header))
        assert dealer.poll(TIMEOUT_MS), "no answer"
        answer: dict[str, Any] = msgpack.unpackb(dealer.recv_multipart()[0])
    context.term()
    return answer


def try_everything(
    socket_dir: Path,
    test: Connection,
    n: int,
    *,
    ids: tuple[int, int, tuple[int, ...]],
    token: bytes = bytes(16),
) -> None:
    """Becomes somebody, then tries to attach in each role and to use a copied token; tells what
    came: by role the error's code and reason, or "attached", and the number of descriptors."""
    become(*ids)
    found: dict[str, Any] = {"pid": os.getpid()}
    for role in ("worker", "admin", "observer"):
        try:
            answer, num_fds = attach_raw(socket_dir, role)
        except OSError as e:
            found[role] = (type(e).__name__, None, 0)
            continue
        error = answer.get("error")
        found[role] = (
            (error["code"], error["details"].get("reason"), num_fds)
            if error
            else ("attached", answer["pool"] and answer["pool"]["name"], num_fds)
        )
    if token != bytes(16):
        found["rpc"] = ask_raw(socket_dir, token, "allocate", {"num_pages": 1}).get("error")
    test.send(found)
    test.recv()


def open_wide(daemon: RunningDaemon) -> None:
    """Take the first line of defence away: everybody reaches the sockets."""
    daemon.socket_dir.chmod(0o755)
    for name in (LEASE_SOCKET, RPC_SOCKET):
        (daemon.socket_dir / name).chmod(0o777)


def give_to_group(daemon: RunningDaemon, group: int) -> None:
    """Start it anew with a socket directory of that group, as a service manager would make it."""
    daemon.stop()
    os.chown(daemon.socket_dir, -1, group)
    daemon.socket_dir.chmod(0o750)
    daemon.start()
