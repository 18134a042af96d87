"""Frames that are no requests, are too large, or come from who may not: nothing changes by them."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
import zmq

from kvd.lease_server import ACCEPT_PAUSE_S
from kvd_shared import verbs
from kvd_shared.errors import TooLarge
from kvd_shared.lease import RPC_SOCKET
from kvd_shared.wire import MAX_FRAME_BYTES
from tests.daemon import child_environment, eventually
from tests.integration.bad_frames import (
    DEEP,
    NAMESPACE,
    REPLY_TIMEOUT_MS,
    SPACE,
    TOKENS,
    Scene,
    answer_to,
    ask,
    made_scene,
    open_lease,
    packet,
    raw_dealer,
    ref_bytes,
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with made_scene(tmp_path_factory.mktemp("daemon")) as scene:
        yield scene


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


LONG = "x" * 100_000
ALLOCATE = {"num_pages": 1, "request": None}
MATCH = {"namespace": SPACE, "tokens": TOKENS}


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
            ({"pool": "default"}, "BAD_REQUEST"),
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
