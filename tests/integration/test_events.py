"""A router's life beside a real daemon: it follows, misses things, joins late, sees a restart."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from kvd_shared import verbs
from kvd_shared.namespace import Namespace
from tests.daemon import RunningDaemon, eventually
from tests.kvd.events.follower import Follower, Latecomer, expected_hashes
from tests.kvd.events.msgpack_reader import decode

PAGE = 16
PLAIN = Namespace(model="m")
TENANT = Namespace(model="m", salt=b"tenant-a")
TOPIC = b"kv@10.0.0.7:8000@m"
LAST = b"\xff" * 8
TIMEOUT_MS = 20_000


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    folder = Path(tempfile.mkdtemp(prefix="kvd"))
    config = tmp_path / "kvd.toml"
    config.write_text(
        f'[daemon]\nsocket_dir = "{folder}"\nlog_format = "json"\n'
        f'[[pool]]\nname = "default"\nsize = "64 pages"\npage_size = {PAGE}\n'
        "[pool.layout]\nnum_layers = 1\nnum_kv_heads = 1\nhead_dim = 8\n"
        f"[pool.events]\ntopic = {json.dumps(TOPIC.decode())}\n"
        f'endpoint = "ipc://{folder}/live"\nreplay_endpoint = "ipc://{folder}/replay"\n'
    )
    daemon = RunningDaemon(folder, config, tmp_path / "kvd.log")
    try:
        daemon.start()
        yield daemon
    finally:
        if hasattr(daemon, "process"):
            daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


class Router:
    """Follows one daemon from its endpoints, as docs/events.md tells consumers to."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self.live = self.context.socket(zmq.SUB)
        self.replay = self.context.socket(zmq.DEALER)
        self.live.subscribe(b"kv@")
        for socket, name in ((self.live, "live"), (self.replay, "replay")):
            socket.setsockopt(zmq.RECONNECT_IVL, 10)
            socket.connect(f"ipc://{folder}/{name}")
        self.state, self.seq = Follower(), -1

    def ask(self, request: bytes) -> list[list[bytes]]:
        """All messages of the answer but the last."""
        self.replay.send_multipart([b"", request])
        messages: list[list[bytes]] = []
        while True:
            assert self.replay.poll(TIMEOUT_MS), "no answer"
            _, *message = self.replay.recv_multipart()
            if message[1] == LAST:
                assert message == [b"", LAST, b""]
                return messages
            messages.append(message)

    def join_by_snapshot(self) -> None:
        (_, cut, header), *slices = self.ask(b"kvd.snapshot")
        self.state, self.seq = Latecomer(), int.from_bytes(cut, "big", signed=True)
        self.state.epoch = decode(header)["epoch"]
        for topic, _, payload in slices:
            assert topic == TOPIC
            self.state.apply(payload)

    def catch_up(self) -> None:
        """What the publisher keeps behind the last number."""
        for topic, seq, payload in self.ask((self.seq + 1).to_bytes(8, "big")):
            assert topic == TOPIC
            number = int.from_bytes(seq, "big")
            assert number == self.seq + 1 or isinstance(decode(payload)[1][0].get("epoch"), str)
            self.state.apply(payload)
            self.seq = number

    def sees(self, hashes: set[int]) -> bool:
        self.catch_up()
        return self.state.pages.keys() == hashes

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def router(daemon: RunningDaemon) -> Iterator[Router]:
    router = Router(daemon.socket_dir)
    yield router
    router.close()


def publish(daemon: RunningDaemon, namespace: Namespace, first: int, num_pages: int) -> set[int]:
    """A worker computes a prompt and leaves it in the cache; the hashes that its pages have."""
    tokens = np.arange(first, first + num_pages * PAGE, dtype="<i4")
    with daemon.attach() as kvd:
        found = kvd.call(verbs.acquire(namespace, tokens, num_pages))
        done = kvd.call(verbs.publish(namespace, tokens, found.refs))
        kvd.call(verbs.free(done.refs))
    pages = tokens.tobytes()
    step = PAGE * 4
    return set(
        expected_hashes(namespace, [pages[i : i + step] for i in range(0, len(pages), step)])
    )


def flush_everything(daemon: RunningDaemon) -> None:
    daemon.ask(verbs.flush())


def test_a_router_from_first_page_to_restart(daemon: RunningDaemon, router: Router) -> None:
    """Two tenants' prompts come; one is flushed with all the rest; it comes again; the daemon is
    killed and comes back; the same prompt has the same hashes all along."""
    plain = publish(daemon, PLAIN, 0, 3)
    eventually(lambda: router.sees(plain))
    first_epoch = router.state.epoch
    tenant = publish(daemon, TENANT, 0, 2)
    assert not plain & tenant
    eventually(lambda: router.sees(plain | tenant))

    latecomer = Router(daemon.socket_dir)
    latecomer.join_by_snapshot()
    assert latecomer.sees(plain | tenant) and latecomer.state.epoch == first_epoch

    flush_everything(daemon)
    assert publish(daemon, PLAIN, 0, 3) == plain
    for one in (router, latecomer):
        eventually(lambda one=one: one.sees(plain))  # type: ignore[misc]
    latecomer.close()
    daemon.check()

    daemon.kill()
    daemon.start()
    other = publish(daemon, PLAIN, 5000, 1)
    assert publish(daemon, PLAIN, 0, 3) == plain
    eventually(lambda: router.sees(plain | other))
    assert router.state.epoch != first_epoch
    assert router.state.orphans == 0


def test_the_stream_is_live(daemon: RunningDaemon, router: Router) -> None:
    """What is published arrives by itself, with the number that a replay gives it."""
    publish(daemon, PLAIN, 0, 1)
    # until the subscription is known to the publisher, what is published is for others
    for first in range(1000, 50_000, 100):
        publish(daemon, PLAIN, first, 1)
        if router.live.poll(50):
            break
    topic, seq, payload = router.live.recv_multipart()
    assert topic == TOPIC and len(seq) == 8
    (replayed, *_) = router.ask(seq)
    assert replayed == [topic, seq, payload]
    (stored,) = [e for e in decode(payload)[1] if e["type"] == "BlockStored"]
    assert stored["medium"] == "CPU" and stored["block_size"] == PAGE


def test_the_sockets_are_the_daemons_group_only_and_go_with_it(daemon: RunningDaemon) -> None:
    paths = [daemon.socket_dir / name for name in ("live", "replay")]
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o660, 0o660]
    assert daemon.stop() == 0
    assert not any(path.exists() for path in paths)
