"""Right frames with faults put in at random: answered one by one, and none is a bug's cause."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np
import pytest

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.daemon import Attachment, Daemon
from kvd.dispatch import FOR_ADMINS
from kvd.operations import OPERATIONS
from kvd.process import Process
from kvd.rpc_server import RpcServer
from kvd_shared.errors import KvdError
from kvd_shared.lease import AttachRequest
from kvd_shared.rpc import RpcCodec
from kvd_shared.wire import MAX_ATTACH_BYTES, TOKEN_LENGTH
from tests.daemon import eventually
from tests.integration.bad_frames import (
    GEOMETRY,
    REPLY_TIMEOUT_MS,
    Scene,
    ask,
    made_scene,
    open_lease,
    packet,
    raw_dealer,
    small_pool,
)
from tests.integration.mutated_frames import fingerprint, good_calls, mutated


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with made_scene(tmp_path_factory.mktemp("daemon")) as scene:
        yield scene


def attached(daemon: Daemon, role: str) -> Attachment:
    return daemon.attach(
        AttachRequest(role=role, name=role, pid=1), Process(pid=1, uid=0, gid=0), 0.0
    )


class HeardServer(RpcServer):
    """Keeps what it would send, and does what can wait as soon as it is asked."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        super().__init__(daemon, folder, asyncio.get_running_loop())
        self.sent: list[list[bytes]] = []

    def _send(self, route: bytes, frames: list[bytes]) -> None:
        self.sent.append(frames)

    def settle(self, cache: CacheManager) -> None:
        while cache.has_chores(time.monotonic()):
            self._chores._run()

    def answer(self, frames: list[bytes]) -> dict[str, Any]:
        answer = self._answer(b"route", (1, 0), frames)
        self.sent.clear()
        while answer is None:
            self._chores._run()
            answer = next((f for f in self.sent if b"notice" not in f[0]), None)
        reply: dict[str, Any] = msgpack.unpackb(answer[0])
        return reply


async def test_mutated_frames_are_answered_and_change_nothing_when_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 of them, as the daemon's process sees them; most are refused, some still make sense.
    After each, the refused ones have left everything as it was and no bug has shown."""
    monkeypatch.setattr("kvd.breaches.BURST", 1_000_000)  # all come over one connection
    random = Random(20_26)
    pool = small_pool()
    daemon = Daemon([pool], tmp_path, 0.0)
    server = HeardServer(daemon, tmp_path)
    codecs = {role: RpcCodec(attached(daemon, role).token) for role in ("worker", "admin")}
    refused: Counter[str] = Counter()
    done: set[str] = set()
    ticket = bytes(16)
    for number in range(20_000):
        sessions = pool.cache.sessions.values()
        session = next((s for s in sessions if s.id > 0 and not s.ended), None)
        if session is None:  # a mutant can have become a detach
            codecs["worker"] = RpcCodec(attached(daemon, "worker").token)
            continue
        if number % 500 == 499:  # empty the pool of what has come through
            daemon.dead(daemon.attachments[session.id], 0.0)
            server.settle(pool.cache)
            continue
        nodes = [int(r) for node in session.nodes for r in np.frombuffer(node.refs, "<i8")]
        held = [*session.writing, *session.leased, *session.sealed, *nodes, 7]
        requests = pool.cache.queue.of_session(session)
        newest = requests[-1].number if requests else 1
        handles = list(session.sequences)
        call = random.choice(good_calls(random, held, newest, nodes, handles, ticket))
        role = "admin" if call.op in FOR_ADMINS else "worker"
        _, frames = codecs[role].request(call)
        if random.random() < 0.9:
            frames = mutated(random, frames)
        pool.cache.tick(time.monotonic())
        server.settle(pool.cache)
        before = fingerprint(pool.cache)
        reply = server.answer(frames)
        if "result" in reply:
            done.add(call.op)
            ticket = reply["result"].get("ticket", ticket)
        else:
            code = reply["error"]["code"]
            refused[code] += 1
            assert code != KvdError.code, (frames, reply)
            assert fingerprint(pool.cache) == before, (frames, reply)
        if number % 50 == 0:
            check_cache(pool.cache)
    check_cache(pool.cache)
    server.close()
    pool.memory.close()
    assert refused.keys() >= {"BAD_REQUEST", "PROTOCOL_MISMATCH", "SESSION_ENDED", "NOT_HELD"}
    assert refused.keys() >= {"UNKNOWN_HANDLE", "UNKNOWN_REQUEST", "NO_PAGES"}
    nobody_to_kill = {"kill_session"}  # these sessions are of no process
    assert done >= (OPERATIONS.keys() | FOR_ADMINS.keys()) - nobody_to_kill
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
