"""Forked children, copied tokens and reused process ids; sessions that end before their process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvd.access import Access
from kvd.admin import main as kvdctl
from kvd.daemon import Daemon
from kvd.process import Process
from kvd.rpc_server import RpcServer
from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import NotAllowed, UnknownHandle
from kvd_shared.lease import LEASE_SOCKET, AttachRequest
from kvd_shared.rpc import RpcCodec
from kvd_shared.wire import MAX_ATTACH_BYTES
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.bad_frames import small_pool
from tests.integration.children import child
from tests.integration.other_user import STRANGER, ask_raw, become, needs_root
from tests.integration.test_daemon import drop_lease

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def in_fork(do: Callable[[], None]) -> int:
    """The pid of a forked child that does it and ends without a word."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
        finally:
            os._exit(0)
    return pid


def hold(socket_dir: Path, test: Connection, num_pages: int) -> None:
    """Attaches, allocates, tells its token and waits."""
    kvd = KvdClient.attach(socket_dir, name="worker")
    kvd.call(verbs.allocate(num_pages))
    test.send((os.getpid(), kvd._codec._token))
    test.recv()


# --- who speaks


def connect_and_fork(socket_dir: Path, test: Connection, parent_dies: int) -> None:
    """Connects, and lets a forked child send the attach packet under its parent's pid, before or
    after the parent's death."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(5.0)
    connection.connect(str(socket_dir / LEASE_SOCKET))
    parent = os.getpid()

    def speak() -> None:
        while parent_dies and os.getppid() == parent:
            time.sleep(0.01)
        connection.send(AttachRequest(role="worker", name="fork", pid=parent).to_wire())
        raw, fds, _, _ = socket.recv_fds(connection, MAX_ATTACH_BYTES, 64)
        error = msgpack.unpackb(raw)["error"]
        test.send([error["code"], error["details"].get("reason"), len(fds)])

    pid = in_fork(speak)
    if parent_dies:
        os._exit(0)
    os.waitpid(pid, 0)
    test.recv()


@pytest.mark.parametrize(("parent_dies", "reason"), [(0, "other_sender"), (1, "dead_process")])
def test_a_connection_is_its_makers_alone(tmp_path: Path, parent_dies: int, reason: str) -> None:
    with (
        running_daemon(tmp_path) as daemon,
        child(connect_and_fork, daemon.socket_dir, parent_dies) as connected,
    ):
        assert connected.says() == ["NOT_ALLOWED", reason, 0]
        assert daemon.sessions() == {}
        [refusal] = daemon.logs("access.refused")
        assert (refusal["reason"], refusal["pid"]) == (reason, connected.process.pid)


def test_a_copied_token_is_of_no_use_to_another_process(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon, child(hold, daemon.socket_dir, 4) as worker:
        pid, token = worker.says()
        for op, args in (("allocate", {"num_pages": 1}), ("detach", {})):
            error = ask_raw(daemon.socket_dir, token, op, args)["error"]
            assert (error["code"], error["details"]["reason"]) == ("NOT_ALLOWED", "other_process")
        assert daemon.counts()["writing"] == 4
        assert daemon.sessions()["worker"]["state"] == "live"
        audited = daemon.logs("access.refused")
        assert [(e["pid"], e["uid"], e["reason"]) for e in audited] == [
            (os.getpid(), os.geteuid(), "other_process")
        ] * 2
        assert pid != os.getpid()


def with_pid(pid: int, do: Callable[[], None], tries: int = 200) -> bool:
    """Do it in a forked child that has this very process id, if one can be made."""
    reading, writing = os.pipe()
    for _ in range(tries):
        LAST_PID.write_text(str(pid - 1))

        def only_as_that_one() -> None:
            if os.getpid() == pid:
                do()
                os.write(writing, b"1")

        made = in_fork(only_as_that_one)
        os.waitpid(made, 0)
        if made == pid:
            os.close(writing)
            with os.fdopen(reading, "rb") as told:
                return told.read() == b"1"
    return False


@pytest.mark.skipif(
    not os.access(LAST_PID, os.W_OK), reason="this kernel lets nobody choose a process id"
)
def test_a_reused_pid_with_a_copied_token_is_nobody(tmp_path: Path) -> None:
    """The daemon is stopped while the worker dies, and while a process that has got its id speaks
    under its token: it reads that message and the news of the death in one turn, in any order."""
    for _ in range(3):
        reuse_once(tmp_path)


def reuse_once(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    with running_daemon(tmp_path) as daemon, child(hold, daemon.socket_dir, 4) as worker:
        pid, token = worker.says()
        daemon.process.send_signal(signal.SIGSTOP)
        worker.process.kill()
        worker.process.join()

        def impostor() -> None:
            waker = in_fork(wake)
            answer = ask_raw(daemon.socket_dir, token, "allocate", {"num_pages": 1})
            heard.write_text(answer.get("error", {}).get("code", "ANSWERED"))
            os.waitpid(waker, 0)

        def wake() -> None:
            time.sleep(0.2)  # its message waits in the socket
            os.kill(daemon.process.pid, signal.SIGCONT)

        try:
            assert with_pid(pid, impostor), f"no process has got the id {pid}"
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert heard.read_text() == "SESSION_ENDED"
        eventually(lambda: daemon.counts()["free"] == 64)
        daemon.check()


async def test_a_message_that_is_read_before_the_news_of_the_death(tmp_path: Path) -> None:
    """In the same turn of the daemon's loop either can come first."""
    pool = small_pool()
    daemon = Daemon([pool], tmp_path, 0.0)
    victim = subprocess.Popen(["sleep", "60"])
    process = Process(pid=victim.pid, uid=7, gid=7, pidfd=os.pidfd_open(victim.pid))
    daemon.access = Access.standard(uid=7, socket_gid=7)
    worker = daemon.attach(AttachRequest(role="worker", name="w", pid=victim.pid), process, 0.0)
    server = RpcServer(daemon, tmp_path, asyncio.get_running_loop())
    codec, peer = RpcCodec(worker.token), (victim.pid, 7)

    def answer(route: bytes) -> dict[str, Any]:
        frames = server._answer(route, peer, codec.request(verbs.allocate(1))[1])
        assert frames is not None
        reply: dict[str, Any] = msgpack.unpackb(frames[0])
        return reply

    assert "result" in answer(b"\0first")
    victim.kill()
    victim.wait()
    refused = answer(b"\0another")["error"]
    assert (refused["code"], refused["details"]) == ("SESSION_ENDED", {"reason": "dead_process"})
    assert worker.route == b"\0first"  # notices do not go to the impostor
    server.close()
    process.close()
    pool.memory.close()


# --- who lives on


def test_an_ended_session_whose_process_lives_is_told_of_and_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        running_daemon(tmp_path, daemon_settings="quarantine_alarm_s = 0.3\n") as daemon,
        child(drop_lease, daemon.socket_dir, 20) as worker,
    ):
        monkeypatch.setenv("KVD_SOCKET_DIR", str(daemon.socket_dir))
        assert worker.says() == "closed"
        [alarm] = eventually(lambda: daemon.logs("session.quarantined"))
        assert (alarm["level"], alarm["pid"], alarm["held_pages"]) == (
            "warning", worker.process.pid, 20
        )  # fmt: skip
        session = daemon.sessions()["second"]
        assert (session["state"], session["process"]) == ("quarantined", "living")
        assert session["ended_s_ago"] >= 0.3
        status = daemon.ask(verbs.status())
        assert (status["quarantined_sessions"], status["quarantine_alarms"]) == (1, 1)
        assert kvdctl(["sessions"]) == kvdctl(["status"]) == 0
        shown = capsys.readouterr().out
        assert "quarantined 0." in shown and "s, process lives" in shown
        assert "1 ended session quarantined, its process not proven dead; 1 alarm since" in shown

        assert kvdctl(["sessions", "kill", str(session["id"])]) == 0
        assert f"killed process {worker.process.pid} of session" in capsys.readouterr().out
        worker.process.join(5)
        assert worker.process.exitcode == -signal.SIGKILL
        eventually(lambda: daemon.counts()["free"] == 64)
        assert daemon.sessions() == {}
        assert kvdctl(["sessions", "kill", str(session["id"])]) == 4
        assert kvdctl(["sessions", "kill"]) == 2
        assert len(daemon.logs("session.ended")) >= 1
        daemon.check()


def test_a_kill_ends_a_live_session_at_once(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon, child(hold, daemon.socket_dir, 4) as worker:
        pid, _ = worker.says()
        number = daemon.sessions()["worker"]["id"]
        with daemon.attach("looks", "observer") as observer, pytest.raises(NotAllowed):
            observer.call(verbs.kill_session(number))
        with daemon.attach("works") as other, pytest.raises(NotAllowed):
            other.call(verbs.kill_session(number))
        assert daemon.sessions()["worker"]["state"] == "live"
        with pytest.raises(UnknownHandle, match="no session 999"):
            daemon.ask(verbs.kill_session(999))
        killed = daemon.ask(verbs.kill_session(number))
        assert (killed["name"], killed["pid"], killed["held_pages"]) == ("worker", pid, 4)
        worker.process.join(5)
        assert worker.process.exitcode == -signal.SIGKILL
        eventually(lambda: daemon.counts()["free"] == 64)
        ended = [e["why"] for e in daemon.logs("session.ended") if e["name"] == "worker"]
        assert ended == ["killed"]  # once, though its connection and its pidfd tell of it, too


def test_pages_come_back_a_grace_after_the_death(tmp_path: Path) -> None:
    settings = "death_grace_s = 1.0\nquarantine_alarm_s = 0.1\n"
    with (
        running_daemon(tmp_path, daemon_settings=settings) as daemon,
        child(hold, daemon.socket_dir, 4) as worker,
    ):
        worker.says()
        killed_s = time.monotonic()
        worker.process.kill()
        eventually(lambda: daemon.sessions()["worker"]["process"] == "dead")
        assert daemon.sessions()["worker"]["state"] == "quarantined"
        assert daemon.counts()["quarantined"] == 4
        eventually(lambda: daemon.counts()["free"] == 64)
        assert time.monotonic() - killed_s >= 1.0
        assert not daemon.logs("session.quarantined")  # who is dead raises no alarm
        daemon.check()


@needs_root
def test_a_daemon_that_may_not_signal_says_so(tmp_path: Path) -> None:
    """Its worker is another user's, and it is not root."""
    victim = in_fork(lambda: time.sleep(30))
    reading, writing = os.pipe()

    def kill_as_stranger() -> None:
        become(STRANGER, STRANGER)
        process = Process(pid=victim, uid=0, gid=0, pidfd=os.pidfd_open(victim))
        try:
            process.kill()
        except NotAllowed as e:
            os.write(writing, e.message.encode())

    os.waitpid(in_fork(kill_as_stranger), 0)
    os.close(writing)
    with os.fdopen(reading) as told:
        message = told.read()
    assert f"the daemon (user {STRANGER}) cannot signal process {victim} of user 0" in message
    assert "CAP_KILL" in message
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)


def test_what_ends_a_session_is_logged_once(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        _ended_by(daemon, lambda kvd: kvd.close())
        _ended_by(daemon, lambda kvd: kvd._connection.shutdown(socket.SHUT_RDWR))
        _ended_by(daemon, lambda kvd: kvd._connection.send(b"?"))
        ended = [e["why"] for e in daemon.logs("session.ended") if e["name"] == "one"]
        assert ended == ["detached", "hung_up", "spoke"]


def _ended_by(daemon: RunningDaemon, end: Callable[[KvdClient], Any]) -> None:
    before = len(daemon.logs("session.ended"))
    kvd = daemon.attach("one")
    end(kvd)
    eventually(lambda: len(daemon.logs("session.ended")) > before)
    kvd._socket.close(linger=0)
    kvd._context.term()
    kvd._connection.close()
