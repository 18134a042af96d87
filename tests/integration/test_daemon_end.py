"""How a daemon ends, and what its clients notice of it."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd.lockfile import LOCK_FILE
from kvd_shared import exit_codes, verbs
from kvd_shared.async_client import AsyncKvdClient
from kvd_shared.client import KvdClient
from kvd_shared.errors import DaemonUnreachable, Draining, SessionEnded
from kvd_shared.lease import LEASE_SOCKET, RPC_SOCKET
from kvd_shared.namespace import Namespace
from tests.daemon import RunningDaemon, eventually, running_daemon, start_process

NAMESPACE = Namespace(model="m")
PAGE = 16  # tokens
BEFORE_DRAIN_TIMEOUT_S = 8.0  # of 10


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, page_size=PAGE) as daemon:
        yield daemon


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
    calls: list[verbs.Call[Any]] = [
        verbs.allocate(1),
        verbs.match(NAMESPACE, range(50)),
        verbs.begin(),
    ]
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
        # that one was too late, and its answer is not taken for this one's
        assert worker.call(verbs.begin()) == 1


def test_no_daemon_at_all(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match=LEASE_SOCKET):
        KvdClient.attach(tmp_path, name="worker")
