"""Reports and changes on a large pool are done in slices: others are answered meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.chores import MAX_JOBS
from kvd.daemon import Attachment, Daemon, Pool
from kvd.dispatch import perform
from kvd.page_map import page_counts, page_states
from kvd.page_pool import MemfdPool
from kvd.process import Process
from kvd.rpc_server import RpcServer
from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import AttachRequest
from kvd_shared.namespace import Namespace
from kvd_shared.page_state import PageState
from kvd_shared.rpc import RpcCodec
from kvd_shared.wire import INLINE_BYTES, MAX_FRAME_BYTES, read_array
from tests.daemon import running_daemon

SPACE = Namespace(model="m")
PAGE = 8  # tokens
POOL = 120_000  # pages
PROMPTS, PROMPT_PAGES = 20_000, 5
NAMESPACES = 1000


# --- in the daemon's process: how many slices there are


def attach(daemon: Daemon, role: str, name: str) -> Attachment:
    return daemon.attach(
        AttachRequest(role=role, name=name, pid=1), Process(pid=1, uid=0, gid=0), 0.0
    )


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[Daemon, CacheManager]]:
    """20,000 prompts of five pages, the first half held by a session that is over, and 1,000
    namespaces of one page more."""
    layout = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=1, page_size=PAGE, dtype="float32")
    cache = CacheManager(POOL, PAGE)
    pool = Pool("p", "cpu", MemfdPool(layout, POOL), None, cache)
    daemon = Daemon([pool], tmp_path, 0.0)
    over, alive = attach(daemon, "worker", "over"), attach(daemon, "worker", "alive")
    assert over.session is not None and alive.session is not None
    for number in range(PROMPTS):
        session = over.session if number < PROMPTS // 2 else alive.session
        refs = cache.allocate(session, PROMPT_PAGES, None, 0.0)
        prompt = np.full(PROMPT_PAGES * PAGE, number, "<i4").tobytes()
        cache.publish(session, SPACE, prompt, refs, None, 0.0)
        if session is alive.session:
            cache.free(session, refs, 0.0)
    for number in range(NAMESPACES):
        space = Namespace(model="n", salt=number.to_bytes(2, "little"))
        refs = cache.allocate(alive.session, 1, None, 0.0)
        cache.publish(alive.session, space, bytes(4 * PAGE), refs, None, 0.0)
    daemon.end_session(over, "hung_up", 0.0)
    yield daemon, cache
    pool.memory.close()


def sliced(daemon: Daemon, op: str, **args: Any) -> tuple[int, dict[str, Any]]:
    """How many slices an admin's request takes, and its result."""
    admin = next((a for a in daemon.attachments.values() if a.role == "admin"), None)
    job = perform(daemon, admin or attach(daemon, "admin", "admin"), op, args, [], 1.0)
    assert not isinstance(job, dict)
    count = 1
    while True:
        try:
            next(job)
            count += 1
        except StopIteration as end:
            return count, end.value


def test_long_requests_have_many_slices(large: tuple[Daemon, CacheManager]) -> None:
    daemon, cache = large
    count, map_ = sliced(daemon, "pages")
    assert count > PROMPTS / 1000 + POOL / 100_000
    assert map_["counts"]["quarantined"] == PROMPTS // 2 * PROMPT_PAGES
    assert map_["map"].count(PageState.QUARANTINED) == PROMPTS // 2 * PROMPT_PAGES
    assert map_["map"].count(PageState.CACHED) == PROMPTS // 2 * PROMPT_PAGES
    count, status = sliced(daemon, "status")
    assert count > PROMPTS / 2 / 1000
    assert status["pools"][0]["counts"] == map_["counts"]
    assert sum(map_["counts"].values()) == POOL
    count, tree = sliced(daemon, "tree", max_nodes=1_000)
    assert count >= 20 and tree["truncated"]
    count, audit = sliced(daemon, "audit")
    assert count > PROMPTS / 20 and (audit["ok"], audit["complete"]) == (True, True)
    prompt = np.full(10, 1 << 30, dtype="<i4").tobytes()
    count, _ = sliced(daemon, "explain", namespace=SPACE.to_wire(), tokens=prompt)
    assert count > NAMESPACES / 50
    count, evicted = sliced(daemon, "evict", num_pages=45_000)
    assert count > 45 and evicted["num_pages"] == 45_000
    count, flushed = sliced(daemon, "flush")
    assert count > NAMESPACES / 200 and flushed["namespaces"] == NAMESPACES + 1
    assert not cache.tree.roots
    while cache.sweep(2.0):
        pass
    check_cache(cache)


def test_an_audit_of_a_busy_pool_says_that_it_is_not_complete(
    large: tuple[Daemon, CacheManager],
) -> None:
    """And raises no false alarm, whatever changes between two of its slices."""
    daemon, cache = large
    admin = attach(daemon, "admin", "admin")
    worker = next(a for a in daemon.attachments.values() if a.name == "alive")
    job = perform(daemon, admin, "audit", {}, [], 1.0)
    assert not isinstance(job, dict)
    held: list[bytes] = []
    for number in range(1_000_000):
        try:
            next(job)
        except StopIteration as end:
            assert end.value == {"pool": "p", "ok": True, "finding": None, "complete": False}
            break
        if number % 100 == 0:
            done = perform(daemon, worker, "allocate", {"num_pages": 7}, [], 1.0)
            assert isinstance(done, dict)
            held.append(done["refs"])
            if len(held) > 3:
                perform(daemon, worker, "free", {"refs": held.pop(0)}, [], 1.0)
            sliced(daemon, "evict", num_pages=3)
    check_cache(cache)


def test_an_audit_finds_what_is_wrong(large: tuple[Daemon, CacheManager]) -> None:
    daemon, cache = large
    cache.tree.num_held += 1
    _, audit = sliced(daemon, "audit")
    assert (audit["ok"], "held" in audit["finding"]) == (False, True)
    cache.tree.num_held -= 1
    lost = cache.free_list.take(1)  # in no place now
    _, audit = sliced(daemon, "audit")
    assert not audit["ok"] and "1 pages are not in exactly one place" in audit["finding"]
    session = next(s for s in cache.sessions.values() if s.name == "alive")
    session.writing[int.from_bytes(lost, "little")] = 1
    assert sliced(daemon, "audit")[1]["ok"]


def test_two_dead_holders_of_one_page_are_counted_once(tmp_path: Path) -> None:
    cache = CacheManager(8, PAGE)
    sessions = [cache.open_session(number, "s", 0.0) for number in (1, 2, 3)]
    refs = cache.allocate(sessions[0], 2, None, 0.0)
    cache.publish(sessions[0], SPACE, bytes(8 * PAGE), refs, None, 0.0)
    for session in sessions[1:]:
        cache.match(session, SPACE, bytes(9 * PAGE), 0.0)
    for session, state in zip(sessions, ("SHARED", "ACTIVE", "QUARANTINED"), strict=True):
        cache.end_session(session)
        states, counts = finished(page_states(cache)), finished(page_counts(cache))
        assert [PageState(s).name for s in states[:2]] == [state] * 2
        assert counts["quarantined"] == (2 if state == "QUARANTINED" else 0)
        assert sum(counts.values()) == 8


def finished(job: Any) -> Any:
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value


# --- who is answered first

LONG_REQUESTS = {
    "status": verbs.status(),
    "pages": verbs.pages(),
    "tree": verbs.tree(max_nodes=1_000),
    "audit": verbs.audit(),
    "evict": verbs.evict(45_000),
    "flush": verbs.flush(),
}


class HeardServer(RpcServer):
    """Keeps what it sends, by whom it is for."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        super().__init__(daemon, folder, asyncio.get_running_loop())
        self.sent: list[tuple[bytes, dict[str, Any]]] = []

    def _send(self, route: bytes, frames: list[bytes]) -> None:
        self.sent.append((route, msgpack.unpackb(frames[0])))


@pytest.mark.parametrize("op", LONG_REQUESTS)
async def test_others_are_answered_meanwhile_and_the_asker_in_order(
    large: tuple[Daemon, CacheManager], tmp_path: Path, op: str
) -> None:
    daemon, _ = large
    server = HeardServer(daemon, tmp_path)
    admin = attach(daemon, "admin", "admin")
    worker = next(a for a in daemon.attachments.values() if a.name == "alive")
    reports, pings = RpcCodec(admin.token), RpcCodec(worker.token)
    server._handle(b"admin", (1, 0), reports.request(LONG_REQUESTS[op])[1])
    server._handle(b"admin", (1, 0), reports.request(verbs.sessions())[1])
    for _ in range(3):
        server._handle(b"worker", (1, 0), pings.request(verbs.probe(SPACE, [1]))[1])
    while len(server.sent) < 5:
        server._chores._run()
    assert [route for route, _ in server.sent] == [b"worker"] * 3 + [b"admin"] * 2
    assert [header["seq"] for _, header in server.sent] == [1, 2, 3, 1, 2]
    assert all("result" in header for _, header in server.sent)
    server.close()


async def test_so_many_long_requests_at_once_and_no_more(
    large: tuple[Daemon, CacheManager], tmp_path: Path
) -> None:
    daemon, _ = large
    server = HeardServer(daemon, tmp_path)
    codec = RpcCodec(attach(daemon, "admin", "admin").token)
    routes = [b"%d" % number for number in range(MAX_JOBS + 1)]
    for route in routes:
        server._handle(route, (1, 0), codec.request(verbs.pages())[1])
    [(refused, header)] = server.sent
    assert (refused, header["error"]["code"]) == (routes[-1], "BUSY")
    while len(server.sent) < len(routes):
        server._chores._run()
    assert {route for route, header in server.sent if "result" in header} == {*routes[:-1]}
    server.close()


async def test_the_reply_to_the_largest_step_can_be_sent(tmp_path: Path) -> None:
    """What it tells of has been done, so it must not be refused for its size."""
    daemon = Daemon([], tmp_path, 0.0)
    server = RpcServer(daemon, tmp_path, asyncio.get_running_loop())
    columns = [f"column {number}" for number in range(7)]
    entry = {"result": dict.fromkeys(columns, bytes(INLINE_BYTES - 1))}
    frames = server._reply(
        attach(daemon, "admin", "a"), 1, {"results": [entry] * verbs.MAX_CALLS_A_STEP}
    )
    assert max(map(len, frames)) < MAX_FRAME_BYTES
    results = msgpack.unpackb(frames[0])["result"]["results"]
    for result in (results[0], results[-1]):
        for name, value in result["result"].items():
            assert len(read_array(value, frames, 1, name)) == INLINE_BYTES - 1
    server.close()


def test_a_client_is_answered_while_a_large_pool_is_audited(tmp_path: Path) -> None:
    """Over sockets, between processes: the audit takes some tenths of a second."""
    with (
        running_daemon(tmp_path, num_pages=POOL, page_size=PAGE, head_dim=1) as daemon,
        daemon.attach("admin", "admin") as admin,
        daemon.attach("worker") as worker,
    ):
        for first in range(0, PROMPTS, 4000):
            publish(worker, first, 4000)
        _, frames = admin._codec.request(verbs.audit())
        admin._socket.send_multipart(frames)
        answered = 0
        while not admin._socket.poll(0):
            worker.call(verbs.probe(SPACE, [1]), timeout_s=30.0)
            answered += 1
        result = msgpack.unpackb(admin._socket.recv_multipart()[0])["result"]
        assert (result["ok"], result["finding"]) == (True, None)
        assert answered > 3
        daemon.check()


def publish(worker: KvdClient, first: int, count: int) -> None:
    refs = worker.call(verbs.allocate(count * PROMPT_PAGES)).reshape(count, PROMPT_PAGES)
    prompts = [np.full(PROMPT_PAGES * PAGE, first + i) for i in range(count)]
    calls = [verbs.publish(SPACE, p, r) for p, r in zip(prompts, refs, strict=True)]
    worker.call(verbs.step(calls), timeout_s=30.0)
    worker.call(verbs.free(refs.ravel()), timeout_s=30.0)
