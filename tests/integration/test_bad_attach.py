"""Bad packets on the lease socket: each is answered with what is wrong, and changes nothing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvd.daemon import Daemon
from kvd.process import Process
from kvd_shared.errors import LayoutMismatch, NotAllowed
from kvd_shared.lease import AttachRequest, attach
from kvd_shared.wire import MAX_ATTACH_BYTES
from tests.daemon import child_environment
from tests.integration.bad_frames import (
    DEEP,
    GEOMETRY,
    Scene,
    made_scene,
    open_lease,
    packet,
    small_pool,
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with made_scene(tmp_path_factory.mktemp("daemon")) as scene:
        yield scene


def say(scene: Scene, packet: bytes) -> dict[str, Any]:
    """The answer to one packet on a connection of its own, behind which the daemon hangs up."""
    with open_lease(scene) as connection:
        connection.send(packet)
        reply: dict[str, Any] = msgpack.unpackb(connection.recv(MAX_ATTACH_BYTES))
        assert connection.recv(1) == b""
    return reply


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
        daemon.attach(request, Process(pid=7, uid=0, gid=0), 0.0)
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
    request = AttachRequest(role="admin", name="above", pid=7)
    with pytest.raises(NotAllowed, match="the kernel shows no pid at all"):
        daemon.attach(request, Process(pid=0, uid=0, gid=0), 0.0)
