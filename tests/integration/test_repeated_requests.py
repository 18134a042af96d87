"""A request that is sent twice is done once; one that comes too late is not done at all."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvd.behind import MAX_WAITING
from kvd.daemon import Attachment, Daemon
from kvd.process import Process
from kvd.reply_window import WINDOW
from kvd.rpc_server import RpcServer
from kvd_shared import verbs
from kvd_shared.async_client import AsyncKvdClient
from kvd_shared.client import KvdClient
from kvd_shared.errors import DaemonTimeout, DaemonUnreachable, DeadlineExceeded, ReplyGone
from kvd_shared.lease import AttachRequest
from kvd_shared.rpc import RpcCodec
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.bad_frames import small_pool
from tests.integration.test_resume import SPACE, crash, kept_daemon

ROUTE, OTHER_ROUTE, PEER = b"\0route", b"\0other", (1, 0)


class Loopback:
    """A server without a network: what it answers, and what it sends later."""

    def __init__(self, folder: Path, role: str = "worker") -> None:
        self.pool = small_pool()
        self.daemon = Daemon([self.pool], folder, 0.0)
        self.server = RpcServer(self.daemon, folder, asyncio.get_running_loop())
        self.attachment = self.attach(role)
        self.codec = RpcCodec(self.attachment.token)
        self.sent: list[tuple[bytes, dict[str, Any]]] = []
        self.server._send = self._send  # type: ignore[method-assign]

    def attach(self, role: str) -> Attachment:
        request = AttachRequest(role=role, name=role, pid=1)
        return self.daemon.attach(request, Process(pid=1, uid=0, gid=0), 0.0)

    def answer(self, frames: list[bytes], route: bytes = ROUTE) -> dict[str, Any] | None:
        found = self.server._answer(route, PEER, frames)
        return None if found is None else msgpack.unpackb(found[0])

    @property
    def num_written(self) -> int:
        assert self.attachment.session is not None
        return len(self.attachment.session.writing)

    def close(self) -> None:
        self.server.close()
        self.pool.memory.close()

    def _send(self, route: bytes, frames: list[bytes]) -> None:
        self.sent.append((route, msgpack.unpackb(frames[0])))


@pytest.fixture
async def worker(tmp_path: Path) -> Any:
    made = Loopback(tmp_path)
    yield made
    made.close()


async def test_a_repeated_request_is_done_once(worker: Loopback) -> None:
    _, frames = worker.codec.request(verbs.allocate(3))
    first = worker.answer(frames)
    assert first is not None and first["epoch"] == 1
    assert worker.answer(frames) == worker.answer(frames, OTHER_ROUTE) == first
    assert worker.num_written == 3
    assert worker.answer(worker.codec.request(verbs.allocate(1))[1]) != first
    assert worker.answer(frames) == first
    assert worker.num_written == 4


async def test_a_refusal_is_final_for_its_number(worker: Loopback) -> None:
    """Else a first copy could be refused and a second one done."""
    seq, late = worker.codec.request(verbs.allocate(3), deadline_ms=1)
    refused = worker.answer(late)
    assert refused is not None and refused["error"]["code"] == "DEADLINE_EXCEEDED"
    in_time = worker.codec.request(verbs.allocate(3), int(time.monotonic() * 1000) + 9999, seq)[1]
    assert worker.answer(in_time) == refused
    assert worker.num_written == 0


async def test_a_number_below_the_window_is_refused(worker: Loopback) -> None:
    seq, old = worker.codec.request(verbs.allocate(1))
    worker.answer(old)
    for _ in range(WINDOW - 1):
        worker.answer(worker.codec.request(verbs.probe(SPACE, [1]))[1])
    assert "result" in (worker.answer(old) or {})
    worker.answer(worker.codec.request(verbs.probe(SPACE, [1]))[1])
    gone = worker.answer(old)
    assert gone is not None
    assert (gone["error"]["code"], gone["error"]["details"]) == ("REPLY_GONE", {"seq": seq})
    assert worker.num_written == 1
    detach = worker.codec.request(verbs.detach(), 0, seq)[1]
    assert "result" in (worker.answer(detach) or {})  # whatever its number


async def test_a_request_in_slices_is_answered_where_it_was_repeated(tmp_path: Path) -> None:
    made = Loopback(tmp_path, "admin")
    _, frames = made.codec.request(verbs.audit())
    before = made.daemon.refused.total()
    assert made.answer(frames) is None
    assert made.answer(frames) is made.answer(frames, OTHER_ROUTE) is None
    while not made.sent:
        made.server._chores._run()
    [(route, reply)] = made.sent
    assert (route, reply["result"]["ok"]) == (OTHER_ROUTE, True)
    assert made.answer(frames) == reply
    assert made.daemon.refused.total() == before
    made.close()


@pytest.mark.parametrize(("num_bytes", "fit"), [(10, MAX_WAITING), (4 << 20, 8)])
async def test_what_waits_behind_a_long_request_is_bounded(
    tmp_path: Path, num_bytes: int, fit: int
) -> None:
    """In messages and in bytes; what found no place is told so, and what did is answered."""
    made = Loopback(tmp_path, "admin")
    made.server._handle(ROUTE, PEER, made.codec.request(verbs.audit())[1])
    for _ in range(fit + 3):
        _, frames = made.codec.request(verbs.sessions())
        made.server._handle(ROUTE, PEER, [*frames, bytes(num_bytes)])
    assert [reply["error"]["code"] for _, reply in made.sent] == ["BUSY"] * 3
    while len(made.sent) < fit + 4:
        made.server._chores._run()
    assert sum("result" in reply for _, reply in made.sent) == fit + 1
    assert not made.server._under_way
    made.close()


async def test_a_resumed_session_keeps_no_answers(worker: Loopback) -> None:
    """A stale epoch is refused before anything is looked up."""
    _, frames = worker.codec.request(verbs.allocate(1))
    worker.answer(frames)
    worker.attachment.epoch = 2
    for _ in range(2):
        stale = worker.answer(frames)
        assert stale is not None
        assert stale["error"]["details"] == {"epoch": 1, "current": 2}
        assert (stale["epoch"], stale["error"]["code"]) == (2, "STALE_EPOCH")
    assert worker.num_written == 1


# --- between processes


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path) as daemon:
        yield daemon


def test_a_call_that_timed_out_is_asked_for_again(daemon: RunningDaemon) -> None:
    """Taken up before its deadline, answered after it: done once."""
    with daemon.attach() as worker:
        number, frames = worker._codec.request(verbs.allocate(5))
        worker._send(frames)
        eventually(lambda: daemon.counts()["writing"] == 5)
        refs = worker.call(verbs.allocate(5), seq=number)
        assert refs.size == 5
        assert daemon.counts()["writing"] == 5


def test_a_lost_answer_costs_nothing(daemon: RunningDaemon) -> None:
    """The first copy of the request never arrives; half way to the timeout it is sent again."""
    with daemon.attach() as worker:
        send, copies = worker._send, list[list[bytes]]()

        def lossy(frames: list[bytes]) -> None:
            copies.append(frames)
            if len(copies) > 1:
                send(frames)

        worker._send = lossy  # type: ignore[method-assign]
        assert worker.call(verbs.allocate(5), timeout_s=1.0).size == 5
        assert copies[0] == copies[1]
        assert worker.call(verbs.allocate(5), timeout_s=1.0).size == 5
        assert daemon.counts()["writing"] == 10


def test_nothing_is_done_for_who_has_stopped_waiting(daemon: RunningDaemon) -> None:
    with daemon.attach() as worker:
        daemon.process.send_signal(signal.SIGSTOP)
        with pytest.raises(DaemonTimeout, match=r"within 0\.2 s") as timeout:
            worker.call(verbs.allocate(5), timeout_s=0.2)
        daemon.process.send_signal(signal.SIGCONT)
        with pytest.raises(DeadlineExceeded, match="nothing was done"):
            worker.call(verbs.allocate(5), seq=timeout.value.details["seq"])
        assert worker.call(verbs.allocate(2)).size == 2
        assert daemon.counts()["writing"] == 2
        assert worker.alive


async def test_the_asyncio_client_resumes(tmp_path: Path) -> None:
    with kept_daemon(tmp_path) as daemon:
        async with await AsyncKvdClient.attach(daemon.socket_dir, name="one") as one:
            refs = await one.call(verbs.allocate(3))
            assert (one.alive, one.fenced, one.epoch) == (True, False, 1)
            os.kill(daemon.pid, signal.SIGSTOP)
            waiting = asyncio.create_task(one.call(verbs.begin(), timeout_s=20.0))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(crash, daemon)
            with pytest.raises(DaemonUnreachable):
                await waiting
            assert not one.alive
            with pytest.raises(DaemonUnreachable):
                await one.call(verbs.begin())
            refused = await one.resume(refs[:2], [1, 1])
            assert (refused.tolist(), one.epoch, one.alive, one.fenced) == ([], 2, True, False)
            many = await asyncio.gather(*(one.call(verbs.allocate(1)) for _ in range(8)))
            assert len({int(r[0]) for r in many}) == 8
            assert daemon.counts()["writing"] == 10
            with pytest.raises(DaemonTimeout) as timeout:
                os.kill(daemon.pid, signal.SIGSTOP)
                await one.call(verbs.allocate(1), timeout_s=0.2)
            os.kill(daemon.pid, signal.SIGCONT)
            with pytest.raises(DeadlineExceeded):
                await one.call(verbs.allocate(1), seq=timeout.value.details["seq"])
        assert daemon.counts()["free"] == 64
        daemon.check()


async def test_the_asyncio_client_sends_again(daemon: RunningDaemon) -> None:
    async with await AsyncKvdClient.attach(daemon.socket_dir, name="one") as one:
        await one.call(verbs.begin())
        socket, sent = one._socket, list[list[bytes]]()

        class Lossy:
            closed = False

            async def send_multipart(self, frames: list[bytes]) -> None:
                sent.append(frames)

        one._socket = Lossy()
        call = asyncio.create_task(one.call(verbs.allocate(5), timeout_s=1.0))
        while not sent:
            await asyncio.sleep(0.01)
        one._socket = socket
        assert (await call).size == 5
        assert daemon.counts()["writing"] == 5


def test_a_message_of_too_many_frames_is_refused(daemon: RunningDaemon) -> None:
    with daemon.attach() as worker:
        _, frames = worker._codec.request(verbs.allocate(1))
        worker._send([*frames, *[bytes(20 << 20)] * 4])
        answer = worker._answer(0, time.monotonic() + 10.0, "allocate")
        assert answer.header["error"]["code"] == "TOO_LARGE"
        assert worker.call(verbs.allocate(2)).size == 2
        assert daemon.counts()["writing"] == 2


def test_an_answer_that_is_gone_is_said_to_be(daemon: RunningDaemon) -> None:
    with KvdClient.attach(daemon.socket_dir, name="one") as one:
        one.call(verbs.allocate(1))
        for _ in range(WINDOW):
            one.call(verbs.probe(SPACE, [1]))
        with pytest.raises(ReplyGone, match="number requests upwards"):
            one.call(verbs.allocate(1), seq=1)
        assert daemon.counts()["writing"] == 1
