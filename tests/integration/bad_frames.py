"""A daemon with a busy worker, and frames that no client of ours would send it."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

from kvd.cache import CacheManager
from kvd.daemon import Pool
from kvd.page_pool import MemfdPool
from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import LEASE_SOCKET, RPC_SOCKET
from kvd_shared.namespace import Namespace
from tests.daemon import RunningDaemon, running_daemon
from tests.integration.daemon_state import nothing_changes

NAMESPACE = Namespace(model="m")
SPACE = NAMESPACE.to_wire()
GEOMETRY = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8}
TOKENS = np.arange(32, dtype="<i4").tobytes()
REPLY_TIMEOUT_MS = 5000
_SEQS = itertools.count(5)
DEEP = b"\x91" * 5000 + b"\xc0"  # lists in lists


@dataclass
class Scene:
    """A daemon with a worker that holds pages in every way, and an admin who looks on."""

    daemon: RunningDaemon
    worker: KvdClient
    admin: KvdClient
    held: list[int]  # 0 and 1 published, 2 and 3 not
    request: int
    worker_token: bytes
    admin_token: bytes
    asked: int = 0  # number of the last request of `ask`

    def nothing_changes(self) -> AbstractContextManager[None]:
        return nothing_changes(self.daemon, self.admin)

    def refused(self, code: str) -> int:
        """How many requests the daemon has refused with this error's code."""
        refused: dict[str, int] = self.admin.call(verbs.status())["refused"]
        return refused.get(code, 0)


@contextmanager
def made_scene(folder: Path) -> Iterator[Scene]:
    with (
        running_daemon(folder) as daemon,
        daemon.attach("worker") as worker,
        daemon.attach("admin", "admin") as admin,
    ):
        held = worker.call(verbs.allocate(4))
        worker.call(verbs.publish(NAMESPACE, np.arange(32), held[:2]))
        request = worker.call(verbs.begin())
        tokens = worker._codec._token, admin._codec._token
        yield Scene(daemon, worker, admin, held.tolist(), request, *tokens)


def open_lease(scene: Scene) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(15.0)
    connection.connect(str(scene.daemon.socket_dir / LEASE_SOCKET))
    return connection


def packet(**changes: Any) -> bytes:
    """An attach packet with some fields changed; a field is left out with `...`."""
    fields = {"v": 1, "op": "attach", "role": "worker", "name": "bad", "pid": os.getpid()}
    fields |= {"pool": None, "geometry": None, "model": None} | changes
    return msgpack.packb({k: v for k, v in fields.items() if v is not ...})


@contextmanager
def raw_dealer(scene: Scene) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(f"ipc://{scene.daemon.socket_dir / RPC_SOCKET}")
    yield dealer
    dealer.close()
    context.term()


def answer_to(scene: Scene, frames: list[bytes]) -> dict[str, Any]:
    with raw_dealer(scene) as dealer:
        dealer.send_multipart(frames)
        assert dealer.poll(REPLY_TIMEOUT_MS), "no answer"
        reply: dict[str, Any] = msgpack.unpackb(dealer.recv())
    return reply


def ask(scene: Scene, op: Any, args: Any, *frames: bytes, **header: Any) -> dict[str, Any]:
    """The answer to a request that is right except for what is given."""
    right = {"v": 1, "epoch": 1, "session": scene.worker_token, "deadline_ms": 0}
    right |= {"op": op, "args": args} | header
    scene.asked = new_seq(scene, right["session"])
    right = {"seq": scene.asked} | right
    fields = {k: v for k, v in right.items() if v is not ...}
    return answer_to(scene, [msgpack.packb(fields), *frames])


def new_seq(scene: Scene, token: Any) -> int:
    """A number that the session's own client will not use, if it is one of the scene's."""
    for client in (scene.worker, scene.admin):
        if client._codec._token == token:
            client._codec._seq += 1
            return client._codec._seq
    return next(_SEQS)


def ref_bytes(*refs: int) -> bytes:
    return np.array(refs, dtype="<i8").tobytes()


def small_pool(model: str | None = None) -> Pool:
    layout = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=1, page_size=8, dtype="float32")
    return Pool("p", "cpu", MemfdPool(layout, 32), model, CacheManager(32, 8))
