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
from kvd.rpc_server import RpcServer
from kvd_shared import verbs
from kvd_shared.errors import KvdError
from kvd_shared.lease import AttachRequest
from kvd_shared.rpc import RpcCodec
from kvd_shared.wire import MAX_ATTACH_BYTES, TOKEN_LENGTH
from tests.daemon import eventually
from tests.integration.bad_frames import (
    GEOMETRY,
    NAMESPACE,
    REPLY_TIMEOUT_MS,
    Scene,
    ask,
    made_scene,
    open_lease,
    packet,
    raw_dealer,
    small_pool,
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with made_scene(tmp_path_factory.mktemp("daemon")) as scene:
        yield scene


def good_calls(
    random: Random,
    held: list[int],
    request: int,
    in_tree: list[int] | None = None,
    handles: list[int] | None = None,
    ticket: bytes = bytes(16),
) -> list[verbs.Call[Any]]:
    """Calls of all kinds, some of which are refused even before they are mutated."""
    zeros = random.random() < 0.3  # so that some prompts are found
    tokens = [0 if zeros else random.randrange(3) for _ in range(random.randrange(1, 40))]
    refs = random.sample(held, min(len(held), 3))
    sealed = random.sample(in_tree or held, 1)
    count = random.randrange(1, 5)
    whole = [0 if zeros else random.randrange(2) for _ in range(8 * len(refs))]
    after = random.choice([None, *held])
    sequence, new = random.choice(handles or [1]), random.randrange(20)
    request_or_none = random.choice([None, request])
    wish = verbs.Retention(priority=random.randrange(101), ttl_s=random.choice([None, 0.001, 5.0]))
    calls: list[verbs.Call[Any]] = [
        verbs.match(NAMESPACE, tokens, random.choice([None, 1])),
        verbs.probe(NAMESPACE, tokens),
        verbs.acquire(NAMESPACE, tokens, count, request_or_none),
        verbs.acquire(NAMESPACE, tokens, count, request, announce=True, own_rate=100.0),
        verbs.allocate(count, request_or_none),
        verbs.lease(count, request_or_none),
        verbs.use(refs),
        verbs.share(refs),
        verbs.free(refs),
        verbs.publish(NAMESPACE, whole, refs, after, random.choice([None, wish])),
        verbs.retain(sealed, wish),
        verbs.fork(refs, random.randrange(8 * len(refs) + 1), count, request_or_none),
        verbs.make_writable(refs[0], request_or_none),
        verbs.seal_tail(refs[0], random.randrange(9)),
        verbs.hand_over(sealed, 5.0),
        verbs.take_over(ticket),
        verbs.match(NAMESPACE, range(1024 + random.randrange(64))),  # as a raw frame
        verbs.begin(count),
        verbs.end(request),
        verbs.yielded(request),
        verbs.announce(request, NAMESPACE, tokens),
        verbs.wait(request, NAMESPACE, tokens, 100.0),
        verbs.open_sequence(NAMESPACE, tokens, request_or_none, ahead=random.randrange(3)),
        verbs.extend([sequence], [random.randrange(40)], [new], range(new)),
        verbs.fork_sequence(sequence, [request_or_none]),
        verbs.close_sequences([sequence]),
    ]
    return [*calls, verbs.step(random.sample(calls, 3)), *admin_calls(random, tokens)]


def admin_calls(random: Random, tokens: list[int]) -> list[verbs.Call[Any]]:
    return [
        verbs.status(),
        verbs.pages(),
        verbs.tree(),
        verbs.sessions(),
        verbs.audit(),
        verbs.explain(NAMESPACE, tokens),
        verbs.who_holds(random.randrange(33)),
        verbs.retained(),
        verbs.evict(random.randrange(4)),
        verbs.flush("m", random.randrange(2), salt=b""),
        verbs.raise_weights_version(random.randrange(9), "another-model"),
        verbs.retain_prompt(NAMESPACE, tokens, random.choice([None, 0.001])),
        verbs.release_prompt(random.randrange(9)),
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
        [(s.id, dict(s.leased), dict(s.writing), dict(s.sealed), s.ended,
          [(q.handle, q.num_tokens, list(q.refs)) for q in s.sequences.values()])
         for s in cache.sessions.values()],
        [r.number for s in cache.sessions.values() for r in cache.queue.of_session(s)],
        (len(cache.handover), list(cache.operator.retained), cache.versions.minimums),
    )  # fmt: skip


def attached(daemon: Daemon, role: str) -> Attachment:
    return daemon.attach(AttachRequest(role=role, name=role, pid=1), 1, 0, 0.0)


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
        answer = self._answer(b"route", 1, frames)
        self.sent.clear()
        while answer is None:
            self._chores._run()
            answer = next((f for f in self.sent if b"notice" not in f[0]), None)
        reply: dict[str, Any] = msgpack.unpackb(answer[0])
        return reply


async def test_mutated_frames_are_answered_and_change_nothing_when_refused(tmp_path: Path) -> None:
    """20,000 of them, as the daemon's process sees them; most are refused, some still make sense.
    After each, the refused ones have left everything as it was and no bug has shown."""
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
    assert done >= OPERATIONS.keys() | FOR_ADMINS.keys()
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
