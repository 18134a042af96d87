"""KV events with keys on a real socket: only listed clients see anything, and what they see travels
encrypted."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
import zmq.auth

from kvd_shared import verbs
from kvd_shared.events_client import CurveKeys, EventsClient
from kvd_shared.namespace import Namespace
from tests.daemon import RunningDaemon, eventually, running_daemon

SPACE = Namespace(model="m", salt=b"a-tenants-secret")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "clients").mkdir()
    zmq.auth.create_certificates(folder, "kvd")
    zmq.auth.create_certificates(folder / "clients", "router")
    zmq.auth.create_certificates(folder, "stranger")
    (folder / "kvd.key_secret").chmod(0o400)
    return folder


def pair(file: Path, server: Path) -> CurveKeys:
    public, secret = zmq.auth.load_certificate(file)
    assert secret is not None
    return CurveKeys(zmq.auth.load_certificate(server)[0], public, secret)


@pytest.fixture
def served(tmp_path: Path, keys: Path) -> Iterator[tuple[RunningDaemon, str, str]]:
    live, replay = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    events = f"""
[pool.events]
endpoint = "{live}"
replay_endpoint = "{replay}"
secret_key_file = "{keys}/kvd.key_secret"
client_keys = "{keys}/clients"
"""
    with running_daemon(tmp_path, settings=events) as daemon:
        yield daemon, live, replay


def publish(daemon: RunningDaemon, first: int) -> None:
    with daemon.attach("worker") as worker:
        refs = worker.call(verbs.allocate(1))
        worker.call(verbs.publish(SPACE, np.arange(first, first + 16), refs))


def test_a_listed_client_follows(served: tuple[RunningDaemon, str, str], keys: Path) -> None:
    daemon, live, replay = served
    own = pair(keys / "clients" / "router.key_secret", keys / "kvd.key")
    with EventsClient(live, replay, keys=own) as client:
        assert client.poll(1.0)[0]["type"] == "AllBlocksCleared"  # the snapshot, by the ROUTER
        publish(daemon, 100)
        stored = eventually(lambda: [e for e in client.poll(0.5) if e["type"] == "BlockStored"])
        assert stored[0]["token_ids"] == list(range(100, 116))
    assert not daemon.logs("access.refused")


@pytest.mark.parametrize("who", ["without keys", "with an unknown key", "with a wrong server key"])
def test_nobody_else_sees_anything(
    served: tuple[RunningDaemon, str, str], keys: Path, who: str
) -> None:
    daemon, live, replay = served
    own = {
        "without keys": None,
        "with an unknown key": pair(keys / "stranger.key_secret", keys / "kvd.key"),
        "with a wrong server key": pair(keys / "clients/router.key_secret", keys / "stranger.key"),
    }[who]
    with EventsClient(live, replay, answer_timeout_s=0.7, keys=own) as client:
        with pytest.raises(TimeoutError, match="has sent nothing"):
            client.poll(0.1)  # asks for a snapshot
        publish(daemon, 300)
        assert not client._live.poll(700)
    if who == "with an unknown key":
        [refusal, *_] = daemon.logs("access.refused")
        public = zmq.auth.load_certificate(keys / "stranger.key")[0].decode()
        assert (refusal["channel"], refusal["reason"]) == ("events", "unknown_key")
        assert public[:8] in refusal["why"] and refusal["address"] == "127.0.0.1"
    daemon.check()


def test_what_travels_cannot_be_read(served: tuple[RunningDaemon, str, str], keys: Path) -> None:
    """A listener on the wire, between a listed client and kvd, sees neither tokens nor salts."""
    daemon, live, replay = served
    port = int(live.rpartition(":")[2])
    seen = bytearray()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(5.0)
        between = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        own = pair(keys / "clients" / "router.key_secret", keys / "kvd.key")
        with EventsClient(between, replay, keys=own) as client:
            theirs, _ = listener.accept()
            ours = socket.create_connection(("127.0.0.1", port))
            os.set_blocking(theirs.fileno(), False)
            os.set_blocking(ours.fileno(), False)
            client.poll(1.0)

            def relayed() -> bool:
                for source, sink in ((theirs, ours), (ours, theirs)):
                    try:
                        data = source.recv(1 << 16)
                    except BlockingIOError:
                        continue
                    seen.extend(data)
                    sink.sendall(data)
                return bool(client._live.poll(1))

            until = time.monotonic() + 1.0  # the handshake and the subscription
            while time.monotonic() < until:
                relayed()
            publish(daemon, 500)
            eventually(relayed)
            assert b"CURVE" in seen and len(seen) > 500
            assert b"BlockStored" not in seen and b"a-tenants-secret" not in seen
            theirs.close()
            ours.close()
