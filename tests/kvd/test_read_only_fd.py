"""What a process of another user can do with a memfd that it was handed for reading."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from kvd.read_only_fd import read_only

OTHER = 61_234  # a user and group that nobody has
SIZE = mmap.PAGESIZE
ROOT = os.geteuid() == 0


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"first", 0)
    yield fd
    os.close(fd)


def outcome_as_other(attempt: Callable[[], object]) -> str:
    """What became of it in a child of another user and group: "done", or the error's name."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "nothing"
        try:
            os.setgroups([])
            os.setresgid(OTHER, OTHER, OTHER)
            os.setresuid(OTHER, OTHER, OTHER)
            attempt()
            text = "done"
        except OSError as e:
            text = errno.errorcode.get(e.errno or 0, "?")
        finally:
            os.write(writing, text.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_another_user_reads_and_can_never_write(memory: int) -> None:
    fd = read_only(memory)
    path = f"/proc/self/fd/{fd}"
    attempts: dict[str, tuple[Callable[[], object], str]] = {
        "read": (lambda: os.pread(fd, 5, 0), "done"),
        "map for reading": (lambda: mmap.mmap(fd, SIZE, prot=mmap.PROT_READ), "done"),
        "write": (lambda: os.pwrite(fd, b"x", 0), "EBADF"),
        "map for writing": (lambda: mmap.mmap(fd, SIZE), "EACCES"),
        "open for writing": (lambda: os.open(path, os.O_RDWR), "EACCES"),
        "open for writing alone": (lambda: os.open(path, os.O_WRONLY), "EACCES"),
        "give itself the right": (lambda: os.fchmod(fd, 0o666), "EPERM"),
        "cut": (lambda: os.ftruncate(fd, 0), "EINVAL"),
        "seal": (lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE), "EPERM"),
    }
    found = {name: outcome_as_other(attempt) for name, (attempt, _) in attempts.items()}
    assert found == {name: wanted for name, (_, wanted) in attempts.items()}
    os.close(fd)


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_a_plain_descriptor_would_not_do(memory: int) -> None:
    """Why there is a function for it: opened for reading, but with the mode that memfds have."""
    fd = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
    assert outcome_as_other(lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR)) == "done"
    os.close(fd)


def test_the_writer_goes_on_writing(memory: int) -> None:
    with mmap.mmap(memory, SIZE) as own:
        fd = read_only(memory)
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as theirs:
            own[:6] = b"second"
            os.pwrite(memory, b"S", 0)
            assert theirs[:6] == b"Second"
        os.close(fd)
