"""Whose session it is when the daemon comes back: stopped, dead, copied, forked and double ones."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import KvdError, NoPages, NotAllowed, SessionEnded, StaleEpoch
from kvd_shared.lease import LEASE_SOCKET, exchange
from kvd_shared.resume import ResumeRequest
from tests.daemon import eventually
from tests.integration.children import child
from tests.integration.other_user import ask_raw
from tests.integration.test_fencing import hold, in_fork
from tests.integration.test_resume import GRACE, SPACE, crash, kept_daemon, resumed

LONG_GRACE = "resume_grace_s = 30\n"


def asked(client: KvdClient, **changes: Any) -> KvdError | None:
    """What is answered to a resume of this session by this process."""
    assert client.pool is not None
    fields: dict[str, Any] = {"token": client._token, "epoch": client.epoch, "pid": os.getpid()}
    request = ResumeRequest(**({"pool_id": client.pool.pool_id} | fields | changes))
    try:
        connection, _, _ = exchange(client._socket_dir, request.to_wire(), 5.0)
    except KvdError as e:
        return e
    connection.close()
    return None


def hold_and_resume(socket_dir: Path, test: Connection, num_pages: int) -> None:
    """Attaches, allocates, tells of it; resumes when told to, and tells what came of it."""
    kvd = KvdClient.attach(socket_dir, name="worker")
    refs = kvd.call(verbs.allocate(num_pages))
    test.send((os.getpid(), kvd.session))
    test.recv()
    try:
        resumed(kvd, dict.fromkeys(refs.tolist(), 1))
        test.send(("resumed", kvd.fenced, kvd.call(verbs.begin())))
    except KvdError as e:
        test.send((e.code, kvd.fenced))
    test.recv()
    kvd.close()
    test.send("closed")
    test.recv()


def test_a_stopped_client_comes_back_in_time(tmp_path: Path) -> None:
    """It sleeps through two starts of the daemon; nobody gets its pages meanwhile."""
    with (
        kept_daemon(tmp_path, daemon_settings=LONG_GRACE) as daemon,
        child(hold_and_resume, daemon.socket_dir, 40) as worker,
    ):
        pid, number = worker.says()
        os.kill(pid, signal.SIGSTOP)
        crash(daemon)
        crash(daemon)
        with daemon.attach("other") as other:
            assert other.call(verbs.allocate(24)).size == 24
        assert daemon.sessions()["worker"]["state"] == "quarantined"
        os.kill(pid, signal.SIGCONT)
        worker.go_on()
        assert worker.says() == ("resumed", False, 1)
        session = daemon.sessions()["worker"]
        assert (session["id"], session["state"]) == (number, "live")
        daemon.check()


def test_a_stopped_client_that_comes_back_too_late_knows_it(tmp_path: Path) -> None:
    """Its own pages are nobody's until it has unmapped the pool."""
    with (
        kept_daemon(tmp_path, daemon_settings=GRACE + "quarantine_alarm_s = 0.2\n") as daemon,
        child(hold_and_resume, daemon.socket_dir, 40) as worker,
    ):
        pid, number = worker.says()
        os.kill(pid, signal.SIGSTOP)
        crash(daemon)
        eventually(lambda: daemon.logs("sessions.fenced"))
        [alarm] = eventually(lambda: daemon.logs("session.quarantined"))
        assert (alarm["session"], alarm["held_pages"]) == (number, 40)
        os.kill(pid, signal.SIGCONT)
        worker.go_on()
        assert worker.says() == ("SESSION_ENDED", True)
        assert daemon.counts()["quarantined"] == 40
        worker.go_on()
        assert worker.says() == "closed"
        eventually(lambda: daemon.counts()["free"] == 64)
        daemon.check()


def test_who_died_meanwhile_is_not_waited_for(tmp_path: Path) -> None:
    with (
        kept_daemon(tmp_path, daemon_settings=LONG_GRACE) as daemon,
        child(hold, daemon.socket_dir, 40) as worker,
        child(hold, daemon.socket_dir, 10) as late,
    ):
        worker.says()
        late.says()
        with daemon.attach("publishes") as one:
            refs = one.call(verbs.allocate(4))
            one.call(verbs.publish(SPACE, range(4 * 16), refs))
        keeper = daemon.process.pid
        os.kill(keeper, signal.SIGSTOP)  # no daemon for a while
        os.kill(daemon.pid, signal.SIGKILL)
        worker.process.kill()
        worker.process.join()
        os.kill(keeper, signal.SIGCONT)
        eventually(lambda: len(daemon.logs("daemon.ready")) == 2, 20.0)
        eventually(lambda: daemon.counts()["free"] == 50)
        assert daemon.counts()["quarantined"] == 10
        with daemon.attach("one") as one:
            with pytest.raises(NoPages):  # the cached ones may be read by who has not resumed
                one.call(verbs.allocate(54))
            late.process.kill()
            eventually(lambda: daemon.counts()["free"] == 60)
            # nobody is waited for any more, long before the grace
            assert one.call(verbs.allocate(64)).size == 64
        daemon.check()


def test_a_session_is_resumed_by_its_own_process_only(tmp_path: Path) -> None:
    """Neither by one that has its token, nor by a forked child of its process."""
    with (
        kept_daemon(tmp_path, daemon_settings=LONG_GRACE) as daemon,
        child(hold, daemon.socket_dir, 4) as worker,
        daemon.attach("mine") as mine,
    ):
        pid, token = worker.says()
        crash(daemon)
        for claimed in (os.getpid(), pid):
            error = asked(mine, token=token, pid=claimed)
            assert isinstance(error, NotAllowed)
            assert error.details["reason"] == "other_process"
        reading, writing = os.pipe()

        def try_it() -> None:
            error = asked(mine)
            os.write(writing, (error.code if error else "RESUMED").encode())

        os.waitpid(in_fork(try_it), 0)
        os.close(writing)
        with os.fdopen(reading) as told:
            assert told.read() == "NOT_ALLOWED"
        answer = ask_raw(daemon.socket_dir, token, "detach", {})["error"]
        assert answer["details"]["reason"] == "other_process"
        assert {one["state"] for one in daemon.sessions().values()} == {"quarantined"}
        assert asked(mine, token=bytes(16)) is not None
        assert resumed(mine, {}) == []
        daemon.check()


def test_of_two_that_resume_one_session_one_does(tmp_path: Path) -> None:
    with kept_daemon(tmp_path, daemon_settings=LONG_GRACE) as daemon, daemon.attach("one") as one:
        one.call(verbs.allocate(4))
        crash(daemon)
        answers: list[Any] = []
        ready = threading.Barrier(2)

        def resume_raw() -> None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.settimeout(5.0)
            connection.connect(str(daemon.socket_dir / LEASE_SOCKET))
            assert one.pool is not None
            request = ResumeRequest(
                token=one._token, epoch=one.epoch, pool_id=one.pool.pool_id, pid=os.getpid()
            )
            ready.wait()
            connection.send(request.to_wire())
            answers.append((msgpack.unpackb(connection.recv(4096)), connection))

        both = [threading.Thread(target=resume_raw) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        codes = sorted(a["error"]["code"] if "error" in a else "RESUMED" for a, _ in answers)
        assert codes == ["RESUMED", "SESSION_ENDED"]
        assert daemon.sessions()["one"]["state"] == "live"
        for _, connection in answers:
            connection.close()
        eventually(lambda: daemon.sessions()["one"]["state"] == "quarantined")
        daemon.check()


def test_a_session_that_did_not_resume_is_told_apart(tmp_path: Path) -> None:
    """A request of the old epoch is for the daemon before; one that was fenced is over."""
    with kept_daemon(tmp_path, daemon_settings=GRACE) as daemon, daemon.attach("one") as one:
        crash(daemon)
        frames = one._codec.request(verbs.match(SPACE, [1, 2]))[1]
        one._send(frames)
        answer = one._answer(one._codec._seq, time.monotonic() + 5.0, "match", is_over=True)
        assert answer.header["error"]["code"] == StaleEpoch.code
        eventually(lambda: one.fenced)
        one._send(one._codec.request(verbs.match(SPACE, [1, 2]))[1])
        answer = one._answer(one._codec._seq, time.monotonic() + 5.0, "match", is_over=True)
        assert answer.header["error"]["code"] == SessionEnded.code


def test_a_crash_while_it_declares(tmp_path: Path) -> None:
    """What had been declared is forgotten with that daemon; the next one hears all of it again."""
    with kept_daemon(tmp_path, daemon_settings=LONG_GRACE) as daemon, daemon.attach("one") as one:
        refs = one.call(verbs.allocate(6))
        crash(daemon)
        connection = _resume_only(one)
        one.call(verbs.declare(refs[:3], [1, 1, 1], done=False))
        with pytest.raises(KvdError) as refused:
            one.call(verbs.begin())
        assert refused.value.code == "UNDECLARED"
        crash(daemon)
        connection.close()
        assert resumed(one, dict.fromkeys(refs[2:].tolist(), 1)) == []
        assert daemon.counts()["writing"] == 4
        daemon.check()


def test_who_hangs_up_while_it_declares_keeps_its_pages_from_others(tmp_path: Path) -> None:
    with kept_daemon(tmp_path, daemon_settings=LONG_GRACE) as daemon, daemon.attach("one") as one:
        refs = one.call(verbs.allocate(6))
        crash(daemon)
        _resume_only(one)
        one.call(verbs.declare(refs[:3], [1, 1, 1], done=False))
        one._connection.close()
        eventually(lambda: daemon.counts()["quarantined"] == 6)
        assert one.fenced
        one.close()
        eventually(lambda: daemon.counts()["free"] == 64)
        daemon.check()


def test_who_declares_too_slowly_is_fenced(tmp_path: Path) -> None:
    with kept_daemon(tmp_path, daemon_settings=GRACE) as daemon, daemon.attach("one") as one:
        refs = one.call(verbs.allocate(6))
        crash(daemon)
        _resume_only(one)
        one.call(verbs.declare(refs[:3], [1, 1, 1], done=False))
        eventually(lambda: one.fenced)
        eventually(lambda: not one.alive)
        assert daemon.sessions()["one"]["state"] == "quarantined"
        assert daemon.counts()["quarantined"] == 6
        daemon.check()


def _resume_only(client: KvdClient) -> socket.socket:
    """Without a word on what it holds."""
    assert client.pool is not None
    request = ResumeRequest(
        token=client._token, epoch=client.epoch, pool_id=client.pool.pool_id, pid=os.getpid()
    )
    connection, answer, _ = exchange(client._socket_dir, request.to_wire(), 5.0)
    client._connection = connection
    client._connection.setblocking(False)
    client._codec.epoch = answer["epoch"]
    return connection
