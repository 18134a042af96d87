"""Who is at the other end of a connection."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from kvd import process as module
from kvd.process import Process, peer_process, start_ticks
from kvd_shared.errors import Busy, NotAllowed

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture(params=["kept by the kernel", "opened"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With SO_PEERPIDFD, and as on a kernel without it."""
    if request.param == "opened":
        monkeypatch.setattr(module, "SO_PEERPIDFD", 9999)
    return str(request.param)


def test_the_peer_is_as_the_kernel_says(pair: Pair, either_way: str) -> None:
    found = peer_process(pair[0])
    assert (found.pid, found.uid, found.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert found.groups == frozenset(os.getgroups())
    assert found.start_ticks == start_ticks(os.getpid()) > 0
    assert not found.is_dead
    found.close()
    found.close()


def test_a_strange_name_does_not_shift_the_start_time() -> None:
    """The name in /proc/PID/stat is the process's own choice."""
    name = "a) R 1 1 (b"
    code = (
        f"import sys; open('/proc/self/comm', 'w').write({name!r}); print(1, flush=True); "
        "sys.stdin.read()"
    )
    odd = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1)
    assert odd.stdout is not None and odd.stdin is not None
    odd.stdout.readline()
    assert abs(start_ticks(odd.pid) / os.sysconf("SC_CLK_TCK") - time.clock_gettime(7)) < 60
    odd.stdin.close()
    odd.wait()
    odd.stdout.close()


def test_an_id_that_changes_hands_meanwhile_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SO_PEERPIDFD", 9999)
    times = iter([100, 200])
    monkeypatch.setattr(module, "start_ticks", lambda pid: next(times))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotAllowed, match="given to another process") as refused:
        peer_process(pair[0])
    assert refused.value.details["reason"] == "dead_process"
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_descriptor_left_is_no_refusal(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(connection: socket.socket) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(module, "_peer_pidfd", none_left)
    with pytest.raises(Busy):
        peer_process(pair[0])


def test_a_kill_reaches_that_process_or_none() -> None:
    victim = subprocess.Popen(["sleep", "60"])
    process = Process(pid=victim.pid, uid=0, gid=0, pidfd=os.pidfd_open(victim.pid))
    assert not process.is_dead
    process.kill()
    assert victim.wait() == -9
    assert process.is_dead
    process.kill()  # nobody is left, and nobody else is hit
    process.close()
    with pytest.raises(NotAllowed, match="cannot signal"):
        process.kill()  # what is not held cannot be killed
