"""Malformed, truncated, oversized and wrong-version frames, on either socket: each is answered with
what is wrong with it, and changes nothing."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.daemon import Attachment, Daemon, Pool
from kvd.lease_server import ACCEPT_PAUSE_S
from kvd.page_pool import MemfdPool
from kvd.rpc_server import RpcServer
from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import KvdError, LayoutMismatch, NotAllowed, TooLarge
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import LEASE_SOCKET, RPC_SOCKET, AttachRequest, attach
from kvd_shared.namespace import Namespace
from kvd_shared.rpc import RpcCodec
from kvd_shared.wire import MAX_ATTACH_BYTES, MAX_FRAME_BYTES, TOKEN_LENGTH
from tests.daemon import RunningDaemon, child_environment, eventually, running_daemon

NAMESPACE = Namespace(model="m")
SPACE = NAMESPACE.to_wire()
GEOMETRY = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8}
TOKENS = np.arange(32, dtype="<i4").tobytes()
REPLY_TIMEOUT_MS = 5000
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

    def state(self) -> Any:
        """All that a refused frame must leave as it is."""
        sessions = self.admin.call(verbs.sessions())["sessions"]
        status = self.admin.call(verbs.status())
        status.pop("uptime_s")
        for session in sessions:
            session.pop("age_s")
        tree = self.admin.call(verbs.tree())
        for space in tree["namespaces"]:
            for node in space["nodes"]:
                node.pop("last_use_s")
        return status, sessions, tree, self.admin.call(verbs.pages())

    @contextmanager
    def nothing_changes(self) -> Iterator[None]:
        before = self.state()
        yield
        assert self.state() == before
        self.daemon.check()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with (
        running_daemon(tmp_path_factory.mktemp("daemon")) as daemon,
        daemon.attach("worker") as worker,
        daemon.attach("admin", "admin") as admin,
    ):
        held = worker.call(verbs.allocate(4))
        worker.call(verbs.publish(NAMESPACE, np.arange(32), held[:2]))
        request = worker.call(verbs.begin())
        tokens = worker._codec._token, admin._codec._token
        yield Scene(daemon, worker, admin, held.tolist(), request, *tokens)


# --- the lease socket


def say(scene: Scene, packet: bytes) -> dict[str, Any]:
    """The answer to one packet on a connection of its own, behind which the daemon hangs up."""
    with open_lease(scene) as connection:
        connection.send(packet)
        reply: dict[str, Any] = msgpack.unpackb(connection.recv(MAX_ATTACH_BYTES))
        assert connection.recv(1) == b""
    return reply


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


BAD_PACKETS = {
    "garbage": (b"\xff\x00garbage", "BAD_REQUEST", "not a msgpack map"),
    "text": (b"GET / HTTP/1.1\r\n\r\n", "BAD_REQUEST", "not a msgpack map"),
    "no map": (msgpack.packb([1, 2]), "BAD_REQUEST", "not a msgpack map but list"),
    "cut": (packet()[:-3], "BAD_REQUEST", "not a msgpack map"),
    "trailing bytes": (packet() + b"\x00", "BAD_REQUEST", "not a msgpack map"),
    "too deep": (DEEP, "BAD_REQUEST", "not a msgpack map"),
    "numbers as keys": (msgpack.packb({1: 2, "v": 1}), "BAD_REQUEST", "not a msgpack map"),
    "a map as a key": (b"\x81\x80\x01", "BAD_REQUEST", "not a msgpack map"),
    "text that is no UTF-8": (b"\x81\xa1v\xa1\xff", "BAD_REQUEST", "not a msgpack map"),
    "a lone surrogate": (packet(name="x").replace(b"\xa1x", b"\xa3\xed\xa0\x80"),
                         "BAD_REQUEST", "not a msgpack map"),
    "version 2": (packet(v=2), "PROTOCOL_MISMATCH", "protocol version 2; this side speaks 1"),
    "version 1.0": (packet(v=1.0), "PROTOCOL_MISMATCH", "protocol version 1.0"),
    "version true": (packet(v=True), "PROTOCOL_MISMATCH", "protocol version True"),
    "version nil": (packet(v=None), "PROTOCOL_MISMATCH", "protocol version None"),
    "no version": (packet(v=...), "PROTOCOL_MISMATCH", "protocol version None"),
    "no op": (packet(op=...), "BAD_REQUEST", "an attach packet is a map with exactly"),
    "another op": (packet(op="detach"), "BAD_REQUEST", "an attach packet is a map with exactly"),
    "a field missing": (packet(geometry=...), "BAD_REQUEST", "map with exactly"),
    "a field more": (packet(extra=1), "BAD_REQUEST", "map with exactly"),
    "unknown role": (packet(role="root"), "BAD_REQUEST", "role 'root': must be one of worker"),
    "a list as role": (packet(role=["worker"]), "BAD_REQUEST", "role ['worker']: must be one of"),
    "no name": (packet(name=""), "BAD_REQUEST", "name '': must be"),
    "a long name": (packet(name="x" * 65), "BAD_REQUEST", "must be"),
    "a very long name": (packet(name="x" * 60_000), "BAD_REQUEST", "must be"),
    "control characters": (packet(name="\x1b[2J"), "BAD_REQUEST", "name '\\x1b[2J': must be"),
    "a number as name": (packet(name=7), "BAD_REQUEST", "name 7: must be"),
    "bytes as pid": (packet(pid=b"7"), "BAD_REQUEST", "pid b'7': must be a positive number"),
    "true as pid": (packet(pid=True), "BAD_REQUEST", "pid True: must be a positive number"),
    "pid 0": (packet(pid=0), "BAD_REQUEST", "pid 0: must be a positive number"),
    "a negative pid": (packet(pid=-1), "BAD_REQUEST", "pid -1: must be a positive number"),
    "the pid of init": (packet(pid=1), "NOT_ALLOWED", "another PID namespace"),
    "a pid of 64 bits": (packet(pid=2**64 - 1), "NOT_ALLOWED", "another PID namespace"),
    "a list as pool": (packet(pool=[]), "BAD_REQUEST", "pool []: must be a string"),
    "unknown pool": (packet(pool="none"), "UNKNOWN_POOL", "no pool 'none'; there are: default"),
    "a long pool": (packet(pool="x" * 60_000), "BAD_REQUEST", "pool 'xxx"),
    "a number as model": (packet(model=7), "BAD_REQUEST", "model 7: must be a string"),
    "a long model": (packet(model="x" * 60_000), "BAD_REQUEST", "model 'xxx"),
    "a list as geometry": (packet(geometry=[1, 1, 8]), "BAD_REQUEST", "geometry [1, 1, 8]: must"),
    "geometry cut": (packet(geometry={"head_dim": 8}), "BAD_REQUEST", "geometry"),
    "geometry of text": (packet(geometry=dict.fromkeys(GEOMETRY, "1")), "BAD_REQUEST", "geometry"),
    "another geometry": (packet(geometry=GEOMETRY | {"head_dim": 64}), "LAYOUT_MISMATCH",
                         "'head_dim': 64} is not that of pool 'default', {"),
    "a negative geometry": (packet(geometry=GEOMETRY | {"head_dim": -8}), "LAYOUT_MISMATCH", "-8"),
    "oversized": (packet(name="x" * (MAX_ATTACH_BYTES + 1)), "TOO_LARGE", "at most 65536 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PACKETS)
def test_a_bad_attach_packet_is_refused(scene: Scene, case: str) -> None:
    raw, code, message = BAD_PACKETS[case]
    with scene.nothing_changes():
        reply = say(scene, raw)
    assert reply["v"] == 1
    assert reply["error"]["code"] == code
    assert message in reply["error"]["message"]
    assert len(reply["error"]["message"]) < 400


def test_the_geometry_mismatch_names_both(scene: Scene) -> None:
    wrong = GEOMETRY | {"num_layers": 2}
    with scene.nothing_changes(), pytest.raises(LayoutMismatch) as refused:
        scene.daemon.attach("bad", geometry=wrong)
    assert refused.value.details == {"worker": wrong, "pool": GEOMETRY}
    scene.daemon.attach("good", geometry=GEOMETRY).close()


def test_the_model_mismatch_names_both() -> None:
    pool = small_pool(model="their-fingerprint")
    daemon = Daemon([pool], Path("/none"), 0.0)
    request = AttachRequest(role="worker", name="bad", pid=7, model="my-fingerprint")
    with pytest.raises(LayoutMismatch, match="my-fingerprint is not that of pool 'p', thei") as e:
        daemon.attach(request, 7, 0, 0.0)
    assert e.value.details == {"worker": "my-fingerprint", "pool": "their-fingerprint"}
    assert daemon.attachments == {}
    pool.memory.close()


def test_an_empty_packet_is_hung_up_on(scene: Scene) -> None:
    """It can't be told from an end of file."""
    with scene.nothing_changes(), open_lease(scene) as connection:
        connection.send(b"")
        assert connection.recv(100) == b""


def test_who_hangs_up_or_sends_fds_is_nothing_to_the_daemon(scene: Scene) -> None:
    with scene.nothing_changes():
        open_lease(scene).close()
        with open_lease(scene) as connection:
            connection.send(packet()[:10])
        with open_lease(scene) as connection:
            socket.send_fds(connection, [packet(v=9)], [0, 1, 2])
            assert b"PROTOCOL_MISMATCH" in connection.recv(1000)


def test_a_connection_that_says_nothing_is_closed(scene: Scene) -> None:
    """And while it says nothing, others are served."""
    with scene.nothing_changes(), open_lease(scene) as silent:
        opened = time.monotonic()
        scene.daemon.attach("in between").close()
        assert silent.recv(100) == b""
        assert time.monotonic() - opened > 4.0  # its timeout is the other bound


def test_talking_after_the_attach_ends_the_session(scene: Scene) -> None:
    request = AttachRequest(role="admin", name="talks", pid=os.getpid())
    attached = attach(scene.daemon.socket_dir, request, 5.0)
    attached.connection.send(b"hello?")
    assert attached.connection.recv(100) == b""
    assert scene.daemon.sessions()["talks"]["state"] == "quarantined"
    attached.connection.close()
    assert scene.daemon.logs("lease.unexpected_packet")


def test_a_client_in_another_pid_namespace_is_refused(scene: Scene) -> None:
    code = (
        "import sys; from pathlib import Path; from kvd_shared.client import KvdClient\n"
        "from kvd_shared.errors import NotAllowed\n"
        "try: KvdClient.attach(Path(sys.argv[1]), name='contained')\n"
        "except NotAllowed as e: print(e)"
    )
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare command")
    command = [unshare, "--pid", "--fork"]
    probed = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if probed.returncode:
        pytest.skip(f"no new PID namespace here: {probed.stderr.strip()}")
    with scene.nothing_changes():
        done = subprocess.run(
            [*command, sys.executable, "-c", code, scene.daemon.socket_dir],
            capture_output=True, text=True, check=True, env=child_environment(),
        )  # fmt: skip
    assert "the peer calls itself pid 1, the kernel shows pid " in done.stdout
    assert "share the host's PID namespace" in done.stdout


def test_a_client_that_the_kernel_does_not_show_is_refused() -> None:
    """The daemon itself runs in a PID namespace below the client's."""
    daemon = Daemon([], Path("/none"), 0.0)
    with pytest.raises(NotAllowed, match="the kernel shows no pid at all"):
        daemon.attach(AttachRequest(role="admin", name="above", pid=7), 0, 0, 0.0)


# --- the RPC socket


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
    right = {"v": 1, "session": scene.worker_token, "seq": 5, "op": op, "args": args}
    fields = {k: v for k, v in (right | header).items() if v is not ...}
    return answer_to(scene, [msgpack.packb(fields), *frames])


BAD_HEADERS: dict[str, tuple[list[bytes], str, str]] = {
    "an empty frame": ([b""], "BAD_REQUEST", "not a msgpack map"),
    "empty frames": ([b"", b"", b""], "BAD_REQUEST", "not a msgpack map"),
    "garbage": ([b"\xc1\xff\x00"], "BAD_REQUEST", "not a msgpack map"),
    "a REQ socket's envelope": ([b"", packet()], "BAD_REQUEST", "not a msgpack map"),
    "a list": ([msgpack.packb([1])], "BAD_REQUEST", "not a msgpack map but list"),
    "nil": ([b"\xc0"], "BAD_REQUEST", "not a msgpack map but NoneType"),
    "too deep": ([DEEP], "BAD_REQUEST", "not a msgpack map"),
    "a length that lies": ([b"\xdf\xff\xff\xff\xff"], "BAD_REQUEST", "not a msgpack map"),
    "an attach packet": ([packet()], "BAD_REQUEST", "a request's header has exactly"),
    "only a version": ([msgpack.packb({"v": 1})], "BAD_REQUEST", "a request's header has exactly"),
    "version 0": ([msgpack.packb({"v": 0})], "PROTOCOL_MISMATCH", "protocol version 0; this side"),
    "a long version": ([msgpack.packb({"v": "1" * 9999})], "PROTOCOL_MISMATCH", "version '111"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_message_without_a_header_is_refused(scene: Scene, case: str) -> None:
    frames, code, message = BAD_HEADERS[case]
    with scene.nothing_changes():
        reply = answer_to(scene, frames)
    assert (reply["v"], reply["seq"], reply["error"]["code"]) == (1, 0, code)
    assert message in reply["error"]["message"]
    assert len(msgpack.packb(reply)) < 1000


HEADER = "a request's header has exactly"
ALLOCATE = {"num_pages": 1, "request": None}
MATCH = {"namespace": SPACE, "tokens": TOKENS}
LONG = "x" * 100_000
Case = tuple[Any, Any, dict[str, Any], str, str]

BAD_REQUESTS: dict[str, Case] = {
    # the header
    "no seq": ("allocate", ALLOCATE, {"seq": ...}, "BAD_REQUEST", HEADER),
    "seq 0": ("allocate", ALLOCATE, {"seq": 0}, "BAD_REQUEST", HEADER),
    "a negative seq": ("allocate", ALLOCATE, {"seq": -1}, "BAD_REQUEST", HEADER),
    "seq true": ("allocate", ALLOCATE, {"seq": True}, "BAD_REQUEST", HEADER),
    "seq 1.5": ("allocate", ALLOCATE, {"seq": 1.5}, "BAD_REQUEST", HEADER),
    "no op": (..., ALLOCATE, {}, "BAD_REQUEST", HEADER),
    "no args": ("allocate", ..., {}, "BAD_REQUEST", HEADER),
    "a field more": ("allocate", ALLOCATE, {"extra": 1}, "BAD_REQUEST", HEADER),
    "another version": ("allocate", ALLOCATE, {"v": 2}, "PROTOCOL_MISMATCH", "version 2"),
    # the session
    "no session": ("allocate", ALLOCATE, {"session": None}, "SESSION_ENDED", "attach again"),
    "an unknown token": ("allocate", ALLOCATE, {"session": b"t" * TOKEN_LENGTH}, "SESSION_ENDED",
                         "no live session has this token"),
    "an empty token": ("allocate", ALLOCATE, {"session": b""}, "SESSION_ENDED", "attach again"),
    "a text as token": ("allocate", ALLOCATE, {"session": "worker"}, "SESSION_ENDED", "attach"),
    "a number as token": ("allocate", ALLOCATE, {"session": 1}, "SESSION_ENDED", "attach again"),
    "a list as token": ("allocate", ALLOCATE, {"session": [b""]}, "SESSION_ENDED", "attach again"),
    # the operation
    "an unknown op": ("alocate", ALLOCATE, {}, "BAD_REQUEST", "no operation 'alocate'"),
    "a private name": ("__init__", {}, {}, "BAD_REQUEST", "no operation '__init__'"),
    "attach": ("attach", {}, {}, "BAD_REQUEST", "no operation 'attach'"),
    "a list as op": (["allocate"], ALLOCATE, {}, "BAD_REQUEST", "op ['allocate']"),
    "a map as op": ({}, {}, {}, "BAD_REQUEST", "op {}"),
    "a long op": (LONG, {}, {}, "BAD_REQUEST", "no operation 'xxx"),
    "a long op, no args": (LONG, None, {}, "BAD_REQUEST", "no operation 'xxx"),
    "a list as args": ("allocate", [1, None], {}, "BAD_REQUEST", "args must be a map, not list"),
    "nil as args": ("detach", None, {}, "BAD_REQUEST", "args must be a map, not NoneType"),
    # its arguments
    "an unknown argument": ("allocate", ALLOCATE | {"n": 1}, {}, "BAD_REQUEST",
                            "allocate: unknown argument 'n'"),
    "a long argument": ("allocate", ALLOCATE | {LONG: 1}, {}, "BAD_REQUEST",
                        "allocate: unknown argument 'xxx"),
    "bytes as an argument": ("allocate", ALLOCATE | {b"n": 1}, {}, "BAD_REQUEST", "unknown argum"),
    "a missing argument": ("allocate", {"num_pages": 1}, {}, "BAD_REQUEST",
                           "allocate: argument 'request' is missing"),
    "detach with arguments": ("detach", {"now": True}, {}, "BAD_REQUEST", "unknown argument 'now'"),
    "a text as count": ("allocate", ALLOCATE | {"num_pages": "1"}, {}, "BAD_REQUEST",
                        "allocate: num_pages = '1' must be a whole number"),
    "a float as count": ("allocate", ALLOCATE | {"num_pages": 1.0}, {}, "BAD_REQUEST", "= 1.0 "),
    "true as count": ("allocate", ALLOCATE | {"num_pages": True}, {}, "BAD_REQUEST", "= True "),
    "a long text as count": ("allocate", ALLOCATE | {"num_pages": LONG}, {}, "BAD_REQUEST", "xxx"),
    "a deep list as count": ("allocate", ALLOCATE | {"num_pages": [[[[[[[[[1]]]]]]]]]}, {},
                             "BAD_REQUEST", "must be a whole number"),
    "0 pages": ("allocate", ALLOCATE | {"num_pages": 0}, {}, "BAD_REQUEST", "a count of 0"),
    "-1 pages": ("allocate", ALLOCATE | {"num_pages": -1}, {}, "BAD_REQUEST", "a count of -1"),
    "too many pages": ("allocate", ALLOCATE | {"num_pages": 65}, {}, "BAD_REQUEST", "pool's 64"),
    "2^64-1 pages": ("allocate", ALLOCATE | {"num_pages": 2**64 - 1}, {}, "BAD_REQUEST", "count"),
    "2^63 sequences": ("begin", {"count": 2**63}, {}, "BAD_REQUEST", "a count of"),
    "-2^63 sequences": ("begin", {"count": -(2**63)}, {}, "BAD_REQUEST", "a count of"),
    "a text as request": ("allocate", ALLOCATE | {"request": "1"}, {}, "BAD_REQUEST",
                          "allocate: request = '1' must be a whole number or nil"),
    "an unknown request": ("allocate", ALLOCATE | {"request": 999}, {}, "UNKNOWN_REQUEST", "999"),
    "end of an unknown one": ("end", {"request": -(2**63)}, {}, "UNKNOWN_REQUEST", "request -92"),
    "yielding an unknown one": ("yielded", {"request": 0}, {}, "UNKNOWN_REQUEST", "request 0"),
    "nil as request to end": ("end", {"request": None}, {}, "BAD_REQUEST", "request = None"),
    # arrays
    "a list as tokens": ("match", MATCH | {"tokens": [1, 2]}, {}, "BAD_REQUEST",
                         "tokens must be bytes or a frame number, not list"),
    "true as tokens": ("match", MATCH | {"tokens": True}, {}, "BAD_REQUEST", "not bool"),
    "no tokens": ("match", MATCH | {"tokens": b""}, {}, "BAD_REQUEST", "no tokens"),
    "tokens cut": ("match", MATCH | {"tokens": TOKENS[:-1]}, {}, "BAD_REQUEST",
                   "tokens has 127 bytes, no multiple of 4"),
    "refs cut": ("free", {"refs": b"1234567"}, {}, "BAD_REQUEST", "refs has 7 bytes, no multiple"),
    "frame 0": ("match", MATCH | {"tokens": 0}, {}, "BAD_REQUEST", "tokens names raw frame 0"),
    "frame 1 of 0": ("match", MATCH | {"tokens": 1}, {}, "BAD_REQUEST", "the message has 0"),
    "frame -1": ("match", MATCH | {"tokens": -1}, {}, "BAD_REQUEST", "tokens names raw frame -1"),
    "frame 2^63": ("match", MATCH | {"tokens": 2**63}, {}, "BAD_REQUEST", "names raw frame 9223"),
    # namespaces
    "a text as namespace": ("match", MATCH | {"namespace": "m"}, {}, "BAD_REQUEST", "namespace"),
    "a frame as namespace": ("match", MATCH | {"namespace": 1}, {}, "BAD_REQUEST", "namespace"),
    "an empty namespace": ("match", MATCH | {"namespace": b""}, {}, "BAD_REQUEST", "namespace"),
    "a deep namespace": ("match", MATCH | {"namespace": DEEP}, {}, "BAD_REQUEST", "namespace"),
    "a short namespace": ("match", MATCH | {"namespace": msgpack.packb(["m", 0, b""])}, {},
                          "BAD_REQUEST", "namespace is not [model, version, adapter, salt]"),
    "a long namespace": ("match", MATCH | {"namespace": msgpack.packb([LONG, 0, b"", b""])}, {},
                         "BAD_REQUEST", "the limit is 1024 bytes"),
    "texts as bytes": ("match", MATCH | {"namespace": msgpack.packb(["m", 0, "", ""])}, {},
                       "BAD_REQUEST", "wanted [str, int, bytes, bytes]"),
    "version -1": ("match", MATCH | {"namespace": msgpack.packb(["m", -1, b"", b""])}, {},
                   "BAD_REQUEST", "weights version -1: must be"),
    # roles
    "a worker's status": ("status", {}, {}, "NOT_ALLOWED", "status needs role admin"),
    "a worker's tree": ("tree", {"pool": None, "max_nodes": 1}, {}, "NOT_ALLOWED", "role admin"),
    # steps
    "a map as calls": ("step", {"calls": {}}, {}, "BAD_REQUEST", "step: calls must be a list"),
    "too many calls": ("step", {"calls": [1] * 4097}, {}, "BAD_REQUEST", "at most 4096"),
    "no calls": ("step", {}, {}, "BAD_REQUEST", "step: argument 'calls' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused(scene: Scene, case: str) -> None:
    op, args, header, code, message = BAD_REQUESTS[case]
    with scene.nothing_changes():
        reply = ask(scene, op, args, **header)
    assert reply["error"]["code"] == code
    assert message in reply["error"]["message"]
    assert len(msgpack.packb(reply)) < 1000
    has_number = type(header.get("seq", 5)) is int and header.get("seq", 5) > 0
    assert reply["seq"] == (5 if has_number and "v" not in header else 0)


def ref_bytes(*refs: int) -> bytes:
    return np.array(refs, dtype="<i8").tobytes()


def test_page_references_that_are_none_are_refused(scene: Scene) -> None:
    published, _, own, _ = scene.held
    past = own + (1 << 32)
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("free", {"refs": ref_bytes(past)}, "NOT_HELD", "generation 0: a reference kept"),
        ("free", {"refs": ref_bytes(own, past)}, "NOT_HELD", "is at generation 0"),
        ("free", {"refs": ref_bytes(own, own)}, "BAD_REQUEST", "named twice"),
        ("free", {"refs": ref_bytes(63)}, "NOT_HELD", "it does not hold that page"),
        ("free", {"refs": ref_bytes(64)}, "NOT_HELD", "the pool has pages 0 to 63"),
        ("free", {"refs": ref_bytes(-1)}, "NOT_HELD", "the pool has pages 0 to 63"),
        ("free", {"refs": ref_bytes(own - (1 << 62))}, "NOT_HELD", "is at generation 0"),
        ("free", {"refs": ref_bytes(-(2**63))}, "NOT_HELD", "is at generation 0"),
        ("share", {"refs": ref_bytes(own, 2**63 - 1)}, "NOT_HELD", "the pool has pages 0 to 63"),
    ]
    publish = {"namespace": SPACE, "tokens": TOKENS, "after": None}
    other = {"namespace": SPACE, "tokens": TOKENS[::-1], "after": None}
    cases += [
        ("publish", publish | {"refs": ref_bytes(own)}, "BAD_REQUEST", "every page has 16 tokens"),
        ("publish", publish | {"refs": b""}, "BAD_REQUEST", "there must be at least one"),
        ("publish", publish | {"refs": ref_bytes(own, own)}, "BAD_REQUEST", "named twice"),
        ("publish", publish | {"refs": ref_bytes(own, -1)}, "NOT_HELD", "the pool has pages"),
        ("publish", other | {"refs": ref_bytes(published, own)}, "BAD_REQUEST", "sealed in the"),
        ("publish", other | {"refs": ref_bytes(own, past)}, "NOT_HELD", "is at generation 0"),
        ("publish", other | {"refs": scene.held[2]}, "BAD_REQUEST", "refs names raw frame 2"),
    ]
    for after, code, message in [
        (own, "BAD_REQUEST", "is not in the tree: publish it as well"),
        (63, "NOT_HELD", "does not hold that page"),
        (-1, "BAD_REQUEST", "after = -1 is no page reference"),
        (2**63, "BAD_REQUEST", "is no page reference"),
        (1.5, "BAD_REQUEST", "after = 1.5 must be a whole number or nil"),
        (2**32 + published, "NOT_HELD", "is at generation 0"),
    ]:
        args = publish | {"refs": ref_bytes(*scene.held[2:]), "after": after}
        cases.append(("publish", args, code, message))
    elsewhere = publish | {"namespace": Namespace(model="n").to_wire(), "after": published}
    cases.append(("publish", elsewhere | {"refs": ref_bytes(*scene.held[2:])},
                  "BAD_REQUEST", "belongs to another namespace"))  # fmt: skip
    with scene.nothing_changes():
        for op, args, code, message in cases:
            error = ask(scene, op, args)["error"]
            assert (error["code"], message in error["message"]) == (code, True), (op, args, error)


def test_a_bad_call_in_a_step_fails_alone(scene: Scene) -> None:
    calls = [
        {"op": "free", "args": {"refs": ref_bytes(63)}},
        {"op": "step", "args": {"calls": []}},
        {"op": "detach", "args": {}},
        {"op": "status", "args": {}},
        {"op": ["free"], "args": {}},
        {"op": "free"},
        {"op": "free", "args": {"refs": b""}, "more": 1},
        "free",
        {"op": LONG, "args": {}},
        {"op": "allocate", "args": [LONG]},
        {"op": "probe", "args": MATCH | {"tokens": 1}},
    ]
    with scene.nothing_changes():
        reply = ask(scene, "step", {"calls": calls}, TOKENS + TOKENS)
    *errors, probed = reply["result"]["results"]
    codes = [entry["error"]["code"] for entry in errors]
    assert codes == ["NOT_HELD"] + ["BAD_REQUEST"] * 9
    assert probed == {"result": {"matched_tokens": 32}}
    assert len(msgpack.packb(reply)) < 3000


def test_an_admin_holds_no_pages(scene: Scene) -> None:
    with scene.nothing_changes():
        for op, args in [("allocate", ALLOCATE), ("match", MATCH), ("step", {"calls": []})]:
            error = ask(scene, op, args, session=scene.admin_token)["error"]
            assert error["code"] == "NOT_ALLOWED"
            assert f"{op} needs role worker; this session is an admin" in error["message"]
        for args, code in [
            ({"pool": "none", "max_nodes": 5}, "UNKNOWN_POOL"),
            ({"pool": LONG, "max_nodes": 5}, "UNKNOWN_POOL"),
            ({"pool": ["default"], "max_nodes": 5}, "BAD_REQUEST"),
            ({"pool": "default", "max_nodes": 0}, "BAD_REQUEST"),
            ({"pool": "default", "max_nodes": None}, "BAD_REQUEST"),
            ({"max_nodes": 5}, "BAD_REQUEST"),
        ]:
            reply = ask(scene, "tree", args, session=scene.admin_token)
            assert reply["error"]["code"] == code
            assert len(msgpack.packb(reply)) < 1000


def test_one_session_has_no_part_in_anothers(scene: Scene) -> None:
    """Neither in its pages nor in its requests; and a token dies with its session."""
    with scene.daemon.attach("other") as other:
        token = other._codec._token
        with scene.nothing_changes():
            for op, args, code in [
                ("free", {"refs": ref_bytes(*scene.held)}, "NOT_HELD"),
                ("free", {"refs": ref_bytes(scene.held[0])}, "NOT_HELD"),
                ("share", {"refs": ref_bytes(scene.held[2])}, "NOT_HELD"),
                ("end", {"request": scene.request}, "UNKNOWN_REQUEST"),
                ("yielded", {"request": scene.request}, "UNKNOWN_REQUEST"),
                ("allocate", ALLOCATE | {"request": scene.request}, "UNKNOWN_REQUEST"),
                ("publish", {"namespace": SPACE, "tokens": TOKENS, "after": None,
                             "refs": ref_bytes(*scene.held[2:])}, "NOT_HELD"),
            ]:  # fmt: skip
                assert ask(scene, op, args, session=token)["error"]["code"] == code
    with scene.nothing_changes():
        assert ask(scene, "allocate", ALLOCATE, session=token)["error"]["code"] == "SESSION_ENDED"


def test_a_token_in_another_process_is_worth_nothing(scene: Scene) -> None:
    code = (
        "import sys; from pathlib import Path; import zmq\n"
        "from kvd_shared import client, rpc, verbs\n"
        "dealer = client.open_rpc_socket(zmq.Context(), Path(sys.argv[1]))\n"
        "dealer.send_multipart(rpc.RpcCodec(bytes.fromhex(sys.argv[2])).request(verbs.begin())[1])\n"
        "print(dealer.recv())"
    )
    with scene.nothing_changes():
        done = subprocess.run(
            [sys.executable, "-c", code, scene.daemon.socket_dir, scene.worker_token.hex()],
            capture_output=True, text=True, check=True, env=child_environment(), timeout=20,
        )  # fmt: skip
    assert "NOT_ALLOWED" in done.stdout
    assert f"session 1 belongs to process {os.getpid()}, and process " in done.stdout


def test_what_is_too_large_is_not_sent(scene: Scene) -> None:
    tokens = np.zeros(MAX_FRAME_BYTES // 4 + 1, np.int32)
    with scene.nothing_changes():
        with pytest.raises(TooLarge, match="over the limit of 33554432 bytes a frame") as refused:
            scene.worker.call(verbs.match(NAMESPACE, tokens))
        assert refused.value.details == {"size": MAX_FRAME_BYTES + 4, "limit": MAX_FRAME_BYTES}
        with pytest.raises(TooLarge, match="fewer operations a step"):
            short = verbs.probe(NAMESPACE, np.zeros(1000, np.int32))
            scene.worker.call(verbs.step([short] * 9000))
    assert scene.worker.call(verbs.probe(NAMESPACE, range(33))) == 32  # it goes on


def test_who_sends_too_much_anyway_is_cut_off_alone(scene: Scene) -> None:
    with scene.nothing_changes(), raw_dealer(scene) as dealer:
        events = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.send(bytes(MAX_FRAME_BYTES + 1))
        assert events.poll(REPLY_TIMEOUT_MS), "still connected"
        dealer.disable_monitor()
        events.close()
        assert not dealer.poll(50)
    assert scene.worker.call(verbs.probe(NAMESPACE, range(33))) == 32
    with raw_dealer(scene) as dealer:  # the largest that may come is answered
        dealer.send_multipart([bytes(MAX_FRAME_BYTES)])
        assert dealer.poll(REPLY_TIMEOUT_MS)


def test_too_few_descriptors_are_a_passing_trouble(scene: Scene) -> None:
    """The daemon can accept nobody for a while, does not spin meanwhile, and then goes on."""
    pid = scene.daemon.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        with open_lease(scene) as waiting:
            opened = time.monotonic()
            eventually(lambda: len(scene.daemon.logs("lease.accept_failed")) >= 3)
            failed = len(scene.daemon.logs("lease.accept_failed"))
            assert failed <= (time.monotonic() - opened) / ACCEPT_PAUSE_S + 2
            assert scene.worker.call(verbs.probe(NAMESPACE, range(33))) == 32
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            waiting.send(packet(v=2))
            assert b"PROTOCOL_MISMATCH" in waiting.recv(1000)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_strangers_on_the_rpc_socket_are_nothing_to_the_daemon(scene: Scene) -> None:
    """Bytes that are no ZeroMQ at all, and a peer that does not read what it is told."""
    with scene.nothing_changes():
        for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(200)):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                stranger.connect(str(scene.daemon.socket_dir / RPC_SOCKET))
                stranger.send(greeting)
        with raw_dealer(scene) as deaf:
            for _ in range(3000):
                deaf.send(b"garbage")
            assert scene.worker.call(verbs.probe(NAMESPACE, range(33))) == 32


# --- mutated frames


def small_pool(model: str | None = None) -> Pool:
    layout = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=1, page_size=8, dtype="float32")
    return Pool("p", "cpu", MemfdPool(layout, 32), model, CacheManager(32, 8))


def good_calls(random: Random, held: list[int], request: int) -> list[verbs.Call[Any]]:
    """Calls of all kinds, some of which are refused even before they are mutated."""
    tokens = [random.randrange(3) for _ in range(random.randrange(1, 40))]
    refs = random.sample(held, min(len(held), 3))
    count = random.randrange(1, 5)
    whole = [random.randrange(2) for _ in range(8 * len(refs))]
    after = random.choice([None, *held])
    calls: list[verbs.Call[Any]] = [
        verbs.match(NAMESPACE, tokens),
        verbs.probe(NAMESPACE, tokens),
        verbs.acquire(NAMESPACE, tokens, count, random.choice([None, request])),
        verbs.allocate(count, random.choice([None, request])),
        verbs.share(refs),
        verbs.free(refs),
        verbs.publish(NAMESPACE, whole, refs, after),
        verbs.match(NAMESPACE, range(1024 + random.randrange(64))),  # as a raw frame
        verbs.begin(count),
        verbs.end(request),
        verbs.yielded(request),
    ]
    return [
        *calls,
        verbs.step(random.sample(calls, 3)),
        verbs.status(),
        verbs.tree(),
        verbs.audit(),
    ]


def mutated(random: Random, frames: list[bytes]) -> list[bytes]:
    """The same frames with one to three faults."""
    frames = [bytes(frame) for frame in frames]
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        at = random.randrange(len(frames))
        raw = bytearray(frames[at])
        cut = random.randrange(len(raw) + 1)
        match random.randrange(9):
            case 0 if raw:  # one byte
                raw[cut - 1] = random.randrange(256)
            case 1 if raw:  # one bit
                raw[cut - 1] ^= 1 << random.randrange(8)
            case 2:
                del raw[cut:]
            case 3:
                del raw[cut : cut + random.randrange(9)]
            case 4:  # one of msgpack's type bytes
                raw[cut:cut] = bytes([random.randrange(0xC0, 0xE0)])
            case 5:
                raw[cut:cut] = random.randbytes(random.randrange(9))
            case 6:
                raw[cut:cut] = raw[: random.randrange(64)]
            case 7:
                frames.insert(at, random.randbytes(random.randrange(20)))
                continue
            case _ if len(frames) > 1:
                frames.pop(at)
                continue
        frames[at] = bytes(raw)
    return frames


def fingerprint(cache: CacheManager) -> Any:
    """Everything that a refused request leaves alone. (Its demand for pages may stay queued.)"""
    return (
        cache.free_list.check().tolist(),
        [(n.id, n.tokens, n.refs, [(s.id, c) for s, c in n.holders.items()])
         for n in cache.tree.nodes()],
        [(s.id, dict(s.writing), dict(s.sealed), s.ended) for s in cache.sessions.values()],
        [r.number for s in cache.sessions.values() for r in cache.queue.of_session(s)],
    )  # fmt: skip


def attached(daemon: Daemon, role: str) -> Attachment:
    return daemon.attach(AttachRequest(role=role, name=role, pid=1), 1, 0, 0.0)


async def test_mutated_frames_are_answered_and_change_nothing_when_refused(tmp_path: Path) -> None:
    """20,000 of them, as the daemon's process sees them; most are refused, some still make sense.
    After each, the refused ones have left everything as it was and no bug has shown."""
    random = Random(20_26)
    pool = small_pool()
    daemon = Daemon([pool], tmp_path, 0.0)
    server = RpcServer(daemon, tmp_path, asyncio.get_running_loop())
    codecs = {role: RpcCodec(attached(daemon, role).token) for role in ("worker", "admin")}
    refused: dict[str, int] = {}
    for number in range(20_000):
        sessions = pool.cache.sessions.values()
        session = next((s for s in sessions if not s.ended), None)
        if session is None:  # a mutant can have become a detach
            codecs["worker"] = RpcCodec(attached(daemon, "worker").token)
            continue
        if number % 500 == 499:  # empty the pool of what has come through
            daemon.dead(daemon.attachments[session.id], 0.0)
            continue
        nodes = [int(r) for node in session.nodes for r in np.frombuffer(node.refs, "<i8")]
        held = [*session.writing, *session.sealed, *nodes, 7]
        requests = pool.cache.queue.of_session(session)
        call = random.choice(good_calls(random, held, requests[-1].number if requests else 1))
        role = "admin" if call.op in ("status", "tree", "audit") else "worker"
        _, frames = codecs[role].request(call)
        if random.random() < 0.9:
            frames = mutated(random, frames)
        before = fingerprint(pool.cache)
        reply = msgpack.unpackb(server._answer(b"route", 1, frames)[0])
        if "error" in reply:
            code = reply["error"]["code"]
            refused[code] = refused.get(code, 0) + 1
            assert code != KvdError.code, (frames, reply)
            assert fingerprint(pool.cache) == before, (frames, reply)
        if number % 50 == 0:
            check_cache(pool.cache)
    check_cache(pool.cache)
    server.close()
    pool.memory.close()
    assert refused.keys() >= {"BAD_REQUEST", "PROTOCOL_MISMATCH", "SESSION_ENDED", "NOT_HELD"}
    assert 10_000 < sum(refused.values()) < 19_000


def test_mutated_frames_through_the_socket(scene: Scene) -> None:
    """The daemon answers each of 2,000, of which all that are without the token are refused."""
    random = Random(7)
    codec = RpcCodec(bytes(TOKEN_LENGTH))
    with scene.nothing_changes(), raw_dealer(scene) as dealer:
        for _ in range(2_000):
            _, frames = codec.request(random.choice(good_calls(random, scene.held, scene.request)))
            dealer.send_multipart(mutated(random, frames))
        for _ in range(2_000):
            assert dealer.poll(REPLY_TIMEOUT_MS)
            reply = msgpack.unpackb(dealer.recv_multipart()[0])
            assert reply["error"]["code"] in ("BAD_REQUEST", "PROTOCOL_MISMATCH", "SESSION_ENDED")


def test_mutated_frames_with_a_live_token_through_the_socket(scene: Scene) -> None:
    """Some of them are right by chance, so this session is one of its own."""
    random = Random(8)
    with scene.daemon.attach("mutant") as mutant, raw_dealer(scene) as dealer:
        codec = RpcCodec(mutant._codec._token)
        for _ in range(2_000):
            _, frames = codec.request(random.choice(good_calls(random, [5, 6, 7], 2)))
            dealer.send_multipart(mutated(random, frames))
            assert dealer.poll(REPLY_TIMEOUT_MS)
            reply = msgpack.unpackb(dealer.recv_multipart()[0])
            assert "result" in reply or reply["error"]["code"] != KvdError.code
        scene.daemon.check()
    eventually(lambda: "mutant" not in scene.daemon.sessions())
    scene.daemon.check()


def test_mutated_attach_packets(scene: Scene) -> None:
    random = Random(9)
    kinds: set[str] = set()
    with scene.nothing_changes():
        for _ in range(500):
            [raw] = mutated(random, [packet(geometry=GEOMETRY)])[:1]
            with open_lease(scene) as connection:
                connection.send(raw)
                reply = connection.recv(MAX_ATTACH_BYTES)
                answer = msgpack.unpackb(reply) if reply else {}
                if "token" in answer:  # a mutant of the name, for example: it detaches
                    ask(scene, "detach", {}, session=answer["token"])
                else:
                    kinds.add(answer["error"]["code"] if reply else "hung up")
    assert kinds >= {"BAD_REQUEST", "NOT_ALLOWED", "LAYOUT_MISMATCH"}
    assert KvdError.code not in kinds
