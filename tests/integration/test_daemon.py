"""Workers and the daemon as real processes on real sockets."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from kvd.lockfile import LOCK_FILE
from kvd_shared import exit_codes, verbs
from kvd_shared.async_client import AsyncKvdClient
from kvd_shared.client import KvdClient
from kvd_shared.errors import (
    DaemonUnreachable,
    Draining,
    NoPages,
    NotHeld,
    SessionEnded,
    UnknownRequest,
)
from kvd_shared.lease import LEASE_SOCKET, RPC_SOCKET, AttachRequest, attach
from kvd_shared.namespace import Namespace
from kvd_shared.refs import page_ids
from kvd_shared.rpc import Notice
from kvd_shared.verbs import Call
from tests.daemon import RunningDaemon, eventually, running_daemon, start_process

NAMESPACE = Namespace(model="m")
PAGE = 16  # tokens
CHILD_TIMEOUT_S = 20.0
BEFORE_DRAIN_TIMEOUT_S = 8.0  # of 10


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, page_size=PAGE) as daemon:
        yield daemon


# --- a second process: the functions that it runs, and how it is run


def compute_prefix(socket_dir: Path, test: Connection, num_pages: int) -> None:
    """Writes page i full of i + 1, publishes all, says which; then holds them until told to end."""
    tokens = np.arange(num_pages * PAGE)
    with KvdClient.attach(socket_dir, name="first") as kvd:
        assert kvd.pool is not None
        assert kvd.mapping is not None
        found = kvd.call(verbs.acquire(NAMESPACE, tokens, num_pages))
        page_bytes = kvd.pool.layout.page_bytes
        memory = np.frombuffer(kvd.mapping.write_view(), np.uint8).reshape(-1, page_bytes)
        for i, page in enumerate(page_ids(found.refs)):
            memory[page] = i + 1
        done = kvd.call(verbs.publish(NAMESPACE, tokens, found.refs))
        test.send(done.refs.tolist())
        test.recv()
        kvd.call(verbs.free(done.refs))


def hold_pages(socket_dir: Path, test: Connection, num_new: int) -> None:
    """Matches what the test has published, begins a request and allocates; then hangs."""
    with KvdClient.attach(socket_dir, name="second") as kvd:
        request = kvd.call(verbs.begin())
        found = kvd.call(verbs.match(NAMESPACE, np.arange(2 * PAGE + 1)))
        kvd.call(verbs.allocate(num_new, request))
        test.send(found.num_matched_pages)
        test.recv()


def drop_lease(socket_dir: Path, test: Connection, num_new: int) -> None:
    """Allocates, closes the lease connection and stays alive with the pool still mapped."""
    kvd = KvdClient.attach(socket_dir, name="second")
    kvd.call(verbs.allocate(num_new))
    kvd._connection.close()
    test.send("closed")
    test.recv()
    os._exit(0)  # without a detach


def grow(socket_dir: Path, test: Connection, num_pages: int) -> None:
    """Decodes one sequence of `num_pages` pages page by page, and gives way when asked to."""
    with KvdClient.attach(socket_dir, name="grows") as kvd:
        request, yields = kvd.call(verbs.begin()), 0
        refs: list[int] = []
        test.send(request)
        test.recv()
        while len(refs) < num_pages:
            with suppress(NoPages):
                refs += kvd.call(verbs.allocate(1, request)).tolist()
            time.sleep(0.002)
            if any(notice == Notice("yield", request) for notice in kvd.notices()):
                kvd.call(verbs.step([verbs.free(refs), verbs.yielded(request)]))
                refs, yields = [], yields + 1
        kvd.call(verbs.step([verbs.free(refs), verbs.end(request)]))
        test.send(yields)
        test.recv()


class Child:
    """One of the functions above in a process of its own."""

    def __init__(self, run: Callable[[Path, Connection, int], None], where: Path, n: int) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self.process: SpawnProcess = multiprocessing.get_context("spawn").Process(
            target=run, args=(where, theirs, n), daemon=True
        )
        self.process.start()
        theirs.close()

    def says(self) -> Any:
        """What it sends next."""
        assert self._connection.poll(CHILD_TIMEOUT_S), "the child process says nothing"
        return self._connection.recv()

    def go_on(self) -> None:
        self._connection.send(None)

    def end(self) -> None:
        """Let it go to its end."""
        self.go_on()
        self.process.join(CHILD_TIMEOUT_S)
        assert self.process.exitcode == 0


@contextmanager
def child(run: Callable[[Path, Connection, int], None], where: Path, n: int) -> Iterator[Child]:
    started = Child(run, where, n)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.join()


# --- sharing


def test_a_prefix_of_one_process_is_read_in_place_by_another(daemon: RunningDaemon) -> None:
    """The first computes four pages. The second finds them while the first still holds them, reads
    the very bytes, computes the same prompt's rest, and keeps them when the first is gone."""
    prompt = np.arange(4 * PAGE)
    with child(compute_prefix, daemon.socket_dir, 4) as first, daemon.attach("second") as second:
        assert second.pool is not None
        assert second.mapping is not None
        published = first.says()
        found = second.call(verbs.acquire(NAMESPACE, [*prompt, 7], 6))
        assert (found.num_matched_pages, found.matched_tokens, found.stop) == (4, 64, "limit")
        assert found.refs[:4].tolist() == published
        assert len(found.refs) == 6

        memory = np.frombuffer(second.mapping.read_view(), np.uint8)
        memory = memory.reshape(-1, second.pool.layout.page_bytes)
        for i, page in enumerate(page_ids(found.refs[:4])):
            assert (memory[page] == i + 1).all()
        assert not np.frombuffer(second.mapping.read_view(), np.uint8).flags.writeable

        assert daemon.counts()["active"] == 4
        assert daemon.ask(verbs.status())["pools"][0]["shared_pages"] == 4
        first.end()
        assert second.call(verbs.match(NAMESPACE, prompt)).matched_tokens == 3 * PAGE
        second.call(verbs.free(found.refs[:3]))
        second.call(verbs.free(found.refs))
        with pytest.raises(NotHeld, match="freed twice"):
            second.call(verbs.free(found.refs[3:4]))
        assert daemon.counts() == {
            "free": 60, "writing": 0, "active": 0, "cached": 4, "duplicate": 0, "quarantined": 0
        }  # fmt: skip
    daemon.check()


def test_a_prompt_computed_twice_is_kept_once(daemon: RunningDaemon) -> None:
    with child(compute_prefix, daemon.socket_dir, 2) as first, daemon.attach("second") as second:
        mine = second.call(verbs.allocate(2))
        canonical = first.says()
        done = second.call(verbs.publish(NAMESPACE, np.arange(2 * PAGE), mine))
        assert (done.refs.tolist(), done.num_new, done.num_duplicates) == (canonical, 0, 2)
        assert daemon.counts()["duplicate"] == 2
        second.call(verbs.free(mine))
        first.end()
        assert daemon.sessions()["second"]["held_pages"] == 2
    daemon.check()


def test_a_step_gives_back_first_and_then_asks(daemon: RunningDaemon) -> None:
    with daemon.attach() as worker:
        full = worker.call(verbs.allocate(64))
        results = worker.call(
            verbs.step(
                [
                    verbs.allocate(1),
                    verbs.publish(NAMESPACE, np.arange(PAGE), full[:1]),
                    verbs.free(full[:2]),
                    verbs.free(full[:1]),
                    verbs.allocate(2),
                ]
            )
        )
        assert isinstance(results[0], NoPages)
        assert results[0].details["missing"] == 1
        assert results[1].num_new == 1
        assert isinstance(results[3], NotHeld)
        assert len(results[4]) == 2  # the freed one, and the cached one by evicting it
        assert worker.call(verbs.probe(NAMESPACE, np.arange(2 * PAGE))) == 0
    daemon.check()


def test_long_prompts_travel_as_raw_frames(tmp_path: Path) -> None:
    prompt = np.random.default_rng(1).integers(0, 1 << 31, 9000)
    with running_daemon(tmp_path, num_pages=600) as daemon, daemon.attach() as worker:
        found = worker.call(verbs.acquire(NAMESPACE, prompt, 563))
        done = worker.call(verbs.publish(NAMESPACE, prompt[: 562 * PAGE], found.refs[:562]))
        assert done.refs.tolist() == found.refs[:562].tolist()
        again = worker.call(verbs.match(NAMESPACE, prompt))
        assert again.refs.tolist() == found.refs[:562].tolist()
        other = worker.call(verbs.probe(Namespace(model="m", salt=b"tenant"), prompt))
        assert other == 0
        daemon.check()


# --- ends of workers


def test_a_killed_worker_leaks_nothing(daemon: RunningDaemon) -> None:
    """Half-written pages come back; what was cached, and what the other session
    does, is as it was."""
    with daemon.attach("first") as first:
        mine = first.call(verbs.allocate(4))
        first.call(verbs.publish(NAMESPACE, np.arange(3 * PAGE), mine[:3]))
        with child(hold_pages, daemon.socket_dir, 20) as second:
            assert second.says() == 2
            assert daemon.counts()["writing"] == 21
            assert daemon.sessions()["second"]["held_pages"] == 22
            second.process.kill()
            eventually(lambda: "second" not in daemon.sessions())
        counts = daemon.counts()
        assert (counts["free"], counts["active"], counts["writing"]) == (60, 3, 1)
        assert daemon.ask(verbs.status())["pools"][0]["running_requests"] == 0
        assert first.call(verbs.match(NAMESPACE, np.arange(4 * PAGE))).num_matched_pages == 3
        first.call(verbs.free(mine))
    [died] = daemon.logs("session.died")
    assert died["held_pages"] == 22
    daemon.check()


def test_a_closed_connection_is_no_proof_of_death(daemon: RunningDaemon) -> None:
    """The process lives and can still write, so its pages stay away from others until it exits."""
    with daemon.attach("first") as first, child(drop_lease, daemon.socket_dir, 60) as second:
        assert second.says() == "closed"
        eventually(lambda: daemon.sessions()["second"]["state"] == "quarantined")
        assert daemon.counts()["quarantined"] == 60
        with pytest.raises(NoPages):
            first.call(verbs.allocate(5))
        second.end()
        eventually(lambda: "second" not in daemon.sessions())
        assert len(first.call(verbs.allocate(64))) == 64
    daemon.check()


def daemon_fds(daemon: RunningDaemon) -> Path:
    return Path(f"/proc/{daemon.process.pid}/fd")


def deaths_awaited(daemon: RunningDaemon) -> int:
    """How many processes the daemon watches."""
    with suppress(FileNotFoundError):  # closed while we looked: look again
        return sum("pidfd" in os.readlink(fd) for fd in daemon_fds(daemon).iterdir())
    return -1


def test_nothing_is_answered_behind_the_end_of_the_lease(daemon: RunningDaemon) -> None:
    request = AttachRequest(role="worker", name="half", pid=os.getpid())
    with KvdClient(daemon.socket_dir, attach(daemon.socket_dir, request, 5.0)) as worker:
        held = worker.call(verbs.allocate(3))
        worker._connection.shutdown(2)
        eventually(lambda: daemon.sessions()["half"]["state"] == "quarantined")
        worker._poller.unregister(worker._connection.fileno())
        calls = [verbs.free(held), verbs.allocate(1), verbs.begin()]
        for call in cast("list[Call[Any]]", calls):
            with pytest.raises(SessionEnded, match="attach again"):
                worker.call(call)
        assert daemon.counts()["quarantined"] == 3
        # But that it has let go is heard: a daemon that stalled reads the two in this order.
        eventually(lambda: deaths_awaited(daemon) == 1)
        worker.call(verbs.detach())
        assert daemon.counts()["free"] == 64
        assert daemon.sessions() == {}
        eventually(lambda: deaths_awaited(daemon) == 0)
    daemon.check()


def test_detach_gives_everything_back_at_once(daemon: RunningDaemon) -> None:
    with daemon.attach("first") as first:
        mine = first.call(verbs.allocate(10))
        first.call(verbs.publish(NAMESPACE, np.arange(2 * PAGE), mine[:2]))
        first.call(verbs.begin(3))
    counts = daemon.counts()
    assert (counts["free"], counts["cached"], counts["quarantined"]) == (62, 2, 0)
    assert daemon.sessions() == {}
    daemon.check()


def test_a_process_that_attaches_often_costs_the_daemon_nothing(daemon: RunningDaemon) -> None:
    descriptors = daemon_fds(daemon)

    def attach_and_detach() -> None:
        with daemon.attach() as worker:
            worker.call(verbs.allocate(1))

    attach_and_detach()
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        attach_and_detach()
    eventually(lambda: len(list(descriptors.iterdir())) <= before)


# --- too few pages


def test_two_workers_that_need_more_than_there_is_both_finish(daemon: RunningDaemon) -> None:
    """Each needs 60 % of the pool at once. The older one never has to give way."""
    where = daemon.socket_dir
    with child(grow, where, 38) as one, child(grow, where, 38) as another:
        both = {one.says(): one, another.says(): another}
        for worker in both.values():
            worker.go_on()
        yields = {number: worker.says() for number, worker in both.items()}
        for worker in both.values():
            worker.end()
    assert yields[1] == 0
    asked = {line["request"] for line in daemon.logs("request.asked_to_yield")}
    assert asked == ({2} if yields[2] else set())
    assert daemon.counts()["free"] == 64
    daemon.check()


def test_the_younger_sequence_is_asked_to_yield(daemon: RunningDaemon) -> None:
    with daemon.attach("older") as older, daemon.attach("younger") as younger:
        old, young = older.call(verbs.begin()), younger.call(verbs.begin())
        held = younger.call(verbs.allocate(60, young))
        assert younger.notices() == []
        with pytest.raises(NoPages) as refused:
            older.call(verbs.allocate(10, old))
        assert refused.value.details == {"missing": 6, "wanted": 10}
        assert eventually(younger.notices) == [Notice("yield", young)]
        assert older.notices() == []
        with pytest.raises(UnknownRequest):
            older.call(verbs.yielded(young))
        younger.call(verbs.step([verbs.free(held), verbs.yielded(young)]))
        assert len(older.call(verbs.allocate(10, old))) == 10
        with pytest.raises(NoPages):
            younger.call(verbs.allocate(60, young))
        daemon.check()


async def test_the_asyncio_client_hears_notices_between_its_calls(daemon: RunningDaemon) -> None:
    younger = await AsyncKvdClient.attach(daemon.socket_dir, name="younger")
    async with younger:
        with daemon.attach("older") as older:
            old, young = older.call(verbs.begin()), await younger.call(verbs.begin())
            held = await younger.call(verbs.allocate(60, young))
            with pytest.raises(NoPages):
                older.call(verbs.allocate(10, old))
            notice = await asyncio.wait_for(younger.notices.get(), 5.0)
            assert notice == Notice("yield", young)
            matches = [younger.call(verbs.match(NAMESPACE, range(n))) for n in range(1, 50)]
            assert [m.matched_tokens for m in await asyncio.gather(*matches)] == [0] * 49
            await younger.call(verbs.free(held))
    assert daemon.counts()["free"] == 64
    daemon.check()


# --- ends of the daemon


def test_sigterm_lets_what_has_begun_finish(daemon: RunningDaemon) -> None:
    with daemon.attach() as worker:
        request = worker.call(verbs.begin())
        daemon.process.send_signal(signal.SIGTERM)
        eventually(lambda: daemon.logs("daemon.draining"))
        with pytest.raises(Draining):
            worker.call(verbs.begin())
        with pytest.raises(Draining):
            daemon.attach("late")
        held = worker.call(verbs.allocate(4, request))
        worker.call(verbs.publish(NAMESPACE, np.arange(4 * PAGE), held))
        time.sleep(0.2)
        assert daemon.process.poll() is None
        worker.call(verbs.end(request))
        assert daemon.wait(BEFORE_DRAIN_TIMEOUT_S) == exit_codes.OK
        assert not worker.alive
        with pytest.raises(DaemonUnreachable):
            worker.call(verbs.free(held))
    assert not daemon.logs("daemon.drain_cut_short")
    assert [path.name for path in daemon.socket_dir.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_wait(daemon: RunningDaemon, number: int) -> None:
    with daemon.attach() as worker:
        worker.call(verbs.begin(2))
        daemon.process.send_signal(number)
        eventually(lambda: daemon.logs("daemon.draining"))
        daemon.process.send_signal(number)
        assert daemon.wait(BEFORE_DRAIN_TIMEOUT_S) == exit_codes.OK
    assert daemon.logs("daemon.drain_cut_short")[0]["requests"] == 2
    assert [path.name for path in daemon.socket_dir.iterdir()] == [LOCK_FILE]


def test_draining_ends_in_time(tmp_path: Path) -> None:
    with running_daemon(tmp_path, drain_timeout_s=0.2) as daemon, daemon.attach() as worker:
        worker.call(verbs.begin())
        assert daemon.stop() == exit_codes.OK
        assert daemon.logs("daemon.drain_cut_short")


def test_a_second_daemon_on_the_same_sockets_is_refused(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    with daemon.attach() as worker:
        second_log = tmp_path / "second.log"
        second = start_process(daemon.config, second_log)
        assert second.wait(10) == exit_codes.IN_USE
        assert f"another kvd (pid {daemon.process.pid})" in second_log.read_text()
        assert len(worker.call(verbs.allocate(3))) == 3
        assert daemon.counts()["writing"] == 3


def test_sockets_of_a_killed_daemon_are_replaced(daemon: RunningDaemon) -> None:
    with daemon.attach("of the first") as before:
        before.call(verbs.allocate(3))
        daemon.kill()
        left = {path.name for path in daemon.socket_dir.iterdir()}
        assert left == {LEASE_SOCKET, RPC_SOCKET, LOCK_FILE}
        with pytest.raises(DaemonUnreachable):
            daemon.attach()
        daemon.start()
        assert not before.alive
        with pytest.raises((DaemonUnreachable, SessionEnded)):
            before.call(verbs.allocate(1))
        with daemon.attach("of the second") as after:
            assert len(after.call(verbs.allocate(64))) == 64
    daemon.check()


def test_a_client_notices_at_once_that_the_daemon_is_gone(daemon: RunningDaemon) -> None:
    with daemon.attach() as worker:
        daemon.process.send_signal(signal.SIGSTOP)  # so that the call is under way when it dies
        threading.Timer(0.2, daemon.process.kill).start()
        asked = time.monotonic()
        with pytest.raises(DaemonUnreachable, match="went away"):
            worker.call(verbs.allocate(1), timeout_s=30.0)
        assert time.monotonic() - asked < 15.0
        asked = time.monotonic()
    assert time.monotonic() - asked < 1.0  # closing does not wait for it either


async def test_an_asyncio_client_notices_that_the_daemon_is_gone(daemon: RunningDaemon) -> None:
    worker = await AsyncKvdClient.attach(daemon.socket_dir, name="worker")
    daemon.process.send_signal(signal.SIGSTOP)
    calls: list[Call[Any]] = [verbs.allocate(1), verbs.match(NAMESPACE, range(50)), verbs.begin()]
    under_way = [asyncio.ensure_future(worker.call(call, timeout_s=30.0)) for call in calls]
    await asyncio.sleep(0.1)
    daemon.kill()
    ends = await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), 15.0)
    assert [type(end) for end in ends] == [DaemonUnreachable] * 3
    with pytest.raises(DaemonUnreachable):
        await worker.call(verbs.begin())
    await asyncio.wait_for(worker.close(), 1.0)


def test_a_daemon_that_does_not_answer_is_not_waited_for_forever(daemon: RunningDaemon) -> None:
    with daemon.attach() as worker:
        daemon.process.send_signal(signal.SIGSTOP)
        with pytest.raises(DaemonUnreachable, match=r"did not answer begin within 0\.2 s"):
            worker.call(verbs.begin(), timeout_s=0.2)
        daemon.process.send_signal(signal.SIGCONT)
        assert worker.call(verbs.begin()) == 2  # the late answer is not taken for this one's


def test_no_daemon_at_all(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match=LEASE_SOCKET):
        KvdClient.attach(tmp_path, name="worker")


def test_a_forked_child_has_no_part_in_the_session(daemon: RunningDaemon) -> None:
    """It neither speaks for its parent nor ends its session by ending."""
    with daemon.attach() as worker:
        held = worker.call(verbs.allocate(2))
        pid = os.fork()
        if pid == 0:
            try:
                worker.call(verbs.free(held))
            except DaemonUnreachable:
                os._exit(0)
            finally:  # also after another error: never back into pytest
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert daemon.sessions()["worker"]["state"] == "live"
        worker.call(verbs.free(held))
    daemon.check()
