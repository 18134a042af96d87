"""Workers and the daemon as real processes on real sockets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import DaemonUnreachable, NoPages, NotHeld, SessionEnded
from kvd_shared.lease import AttachRequest, attach
from kvd_shared.namespace import Namespace
from kvd_shared.refs import page_ids
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.children import child

NAMESPACE = Namespace(model="m")
PAGE = 16  # tokens


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, page_size=PAGE) as daemon:
        yield daemon


# --- what a second process runs


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
        states = ("leased", "writing", "active", "duplicate", "quarantined")
        assert daemon.counts() == {"free": 60, "cached": 4} | dict.fromkeys(states, 0)
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
        calls = [verbs.free(held), verbs.allocate(1), verbs.begin()]
        for call in cast("list[verbs.Call[Any]]", calls):
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
