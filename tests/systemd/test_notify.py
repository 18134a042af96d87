"""Messages to a service manager, read by a bare socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_shared.notify import NotifyFailed, NotifySocket


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A manager's socket, and its address as NOTIFY_SOCKET has it."""
    abstract = request.param == "abstract"
    name = f"kvd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind("\0" + name if abstract else name)
        reader.settimeout(5)
        yield reader, "@" + name if abstract else name


def test_every_message_as_it_goes_out(manager: tuple[socket.socket, str]) -> None:
    reader, address = manager
    notify = NotifySocket(address)
    notify.ready("64 pages")
    notify.status("63 pages")
    notify.watchdog()
    notify.abort_me()
    notify.stopping()
    notify.remove("pool.a.0")
    assert [reader.recv(4096).decode() for _ in range(6)] == [
        "READY=1\nSTATUS=64 pages",
        "STATUS=63 pages",
        "WATCHDOG=1",
        "WATCHDOG=trigger",
        "STOPPING=1",
        "FDSTOREREMOVE=1\nFDNAME=pool.a.0",
    ]


def test_a_stored_fd_is_the_same_file(manager: tuple[socket.socket, str]) -> None:
    reader, address = manager
    memory = os.memfd_create("test")
    NotifySocket(address).store("pool.a.0", memory)
    text, (theirs,), _, _ = socket.recv_fds(reader, 4096, 4)
    assert text == b"FDSTORE=1\nFDNAME=pool.a.0\nFDPOLL=0"
    assert os.path.sameopenfile(memory, theirs)
    os.close(memory)
    os.close(theirs)


@pytest.mark.parametrize("name", ["", "a:b", "a\nREADY=1", "ä", "x" * 256])
def test_a_name_that_a_manager_would_ignore_is_never_sent(name: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 255 printable ASCII"):
        NotifySocket("@nobody").store(name, 0)
    with pytest.raises(ValueError, match="must be 1 to 255 printable ASCII"):
        NotifySocket("@nobody").remove(name)


def test_a_barrier_waits_until_what_was_sent_is_read(manager: tuple[socket.socket, str]) -> None:
    reader, address = manager
    read: list[bytes] = []

    def manage() -> None:
        read.append(reader.recv(4096))
        text, fds, _, _ = socket.recv_fds(reader, 4096, 4)
        read.append(text)
        for fd in fds:
            os.close(fd)

    notify = NotifySocket(address)
    notify.remove("a")
    thread = threading.Timer(0.2, manage)
    thread.start()
    notify.barrier()
    assert read == [b"FDSTOREREMOVE=1\nFDNAME=a", b"BARRIER=1"]
    thread.join()


def test_a_manager_that_hangs_is_waited_for_only_so_long(
    manager: tuple[socket.socket, str],
) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    notify = NotifySocket(manager[1])
    with pytest.raises(NotifyFailed, match=r"not read within 0\.1 s"):
        notify.barrier(timeout_s=0.1)
    with pytest.raises(NotifyFailed, match=r"queue was full for 0\.1 s"):
        for _ in range(100_000):
            notify.send("STATUS=again", wait_s=0.1)
    notify.watchdog()  # the loop never waits, and a full queue is no reason to give up
    notify.status("still here")
    assert len(os.listdir("/proc/self/fd")) == fds


def test_nobody_there_is_said(tmp_path: Path) -> None:
    for address in (str(tmp_path / "absent"), "@kvd-nobody-has-this"):
        with pytest.raises(NotifyFailed, match=f"{address}: WATCHDOG=1: "):
            NotifySocket(address).watchdog()


def test_from_the_environment() -> None:
    env = {"NOTIFY_SOCKET": "@a", "HOME": "/"}
    found = NotifySocket.from_environment(env)
    assert found is not None and found.address == "@a"
    assert env == {"HOME": "/"}  # children are not to speak for us
    assert NotifySocket.from_environment(env) is None
    for bad in ("vsock:2:1", "relative", "@", "/"):
        with pytest.raises(NotifyFailed, match="must be an absolute path or @name"):
            NotifySocket.from_environment({"NOTIFY_SOCKET": bad})
