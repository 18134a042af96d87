"""The fds that the keeper keeps for the daemon, and how they travel."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct

from kvd.keeper_log import say

MAX_FDS = 768  # of 1024, the usual limit of a process
MAX_MESSAGE = 4096  # bytes
MAX_CONTROL = 4096  # bytes: 253 fds, as many as a message can have, and credentials
FIRST_FD = 3
Control = list[tuple[int, int, bytes]]


class KeptFds:
    """Invariant: every fd in `_fds` is this object's alone, with close-on-exec set."""

    def __init__(self) -> None:
        self._fds: list[tuple[str, int]] = []  # in the order of their coming

    def __len__(self) -> int:
        return len(self._fds)

    def store(self, name: str, fds: list[int]) -> None:
        """Duplicates of them, unless they are kept under that name already."""
        for fd in fds:
            if any(n == name and os.path.sameopenfile(fd, kept) for n, kept in self._fds):
                continue
            if len(self._fds) >= MAX_FDS:
                say("keeper.store_full", name=name, max_fds=MAX_FDS, effect="it is not kept")
                return
            self._fds.append((name, os.dup(fd)))

    def remove(self, name: str) -> None:
        for _, fd in (gone := [each for each in self._fds if each[0] == name]):
            os.close(fd)
        self._fds = [each for each in self._fds if each not in gone]

    def hand_over(self, pid: str) -> dict[str, str]:
        """In the forked child, before exec: makes them its fds 3, 4, … and returns the environment
        that says so."""
        if not self._fds:
            return {}
        above = FIRST_FD + len(self._fds)
        # first out of the way of one another, then into place
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for _, fd in self._fds]
        for place, fd in enumerate(high, FIRST_FD):
            os.dup2(fd, place, inheritable=True)
        names = ":".join(name for name, _ in self._fds)
        return {"LISTEN_FDS": str(len(high)), "LISTEN_FDNAMES": names, "LISTEN_PID": pid}


def received(control: Control) -> list[int]:
    """The fds of one message, the caller's to close. The kernel has dropped those that this
    process has no room for."""
    fds = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def sender_pid(control: Control) -> int:
    """By the kernel's word, SCM_CREDENTIALS; 0: not told."""
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(struct.unpack("3i", data[:12])[0])
    return 0
