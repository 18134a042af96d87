"""A peer's process: who it is, as the kernel says, and a hold on that very process.

A process id names whoever has it now. A pidfd names one process for ever: it tells of its death,
and a signal sent through it reaches that process or none. The start time (field 22 of
/proc/PID/stat) is what is left to tell two owners of an id apart where no pidfd was kept.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
from dataclasses import dataclass

from kvd_shared.errors import Busy, NotAllowed
from kvd_shared.lease import peer_credentials

# Of asm-generic/socket.h; Python 3.11 has no names for them.
SO_PEERGROUPS = getattr(socket, "SO_PEERGROUPS", 59)  # Linux 4.13
SO_PEERPIDFD = getattr(socket, "SO_PEERPIDFD", 77)  # Linux 6.5
MAX_GROUPS = 256  # supplementary ones that Python's getsockopt has room for


@dataclass(slots=True, kw_only=True)
class Process:
    """One process. `pidfd` is owned: `close` it."""

    pid: int  # 0: the kernel shows none, it is not of this PID namespace
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()  # supplementary ones
    start_ticks: int = 0  # since boot, in clock ticks; 0: not known
    pidfd: int = -1  # -1: none

    @property
    def is_dead(self) -> bool:
        """Whether its death is proven. The kernel says so before anyone can have its id."""
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        """SIGKILL to this very process; nothing if it is dead. Raises NotAllowed where the daemon
        may not signal it."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        except OSError as e:
            raise NotAllowed(
                f"the daemon (user {os.geteuid()}) cannot signal process {self.pid} of user "
                f"{self.uid}: {e.strerror}; end it yourself, or give the daemon CAP_KILL",
                reason="cannot_signal",
            ) from e

    def close(self) -> None:
        """Idempotent."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def peer_process(connection: socket.socket) -> Process:
    """The process that connected. Raises NotAllowed when it is dead or cannot be watched, Busy when
    this process has no descriptor left."""
    pid, uid, gid = peer_credentials(connection)
    process = Process(pid=pid, uid=uid, gid=gid, groups=_peer_groups(connection))
    if not pid:
        return process
    try:
        process.pidfd = _peer_pidfd(connection)
        if process.pidfd < 0:
            process.pidfd = _opened_pidfd(pid)
        process.start_ticks = start_ticks(pid)
    except OSError as e:
        process.close()
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise Busy("the daemon has no file descriptor left: attach again later") from e
        raise NotAllowed(
            f"process {pid} cannot be watched: {e.strerror}", reason="dead_process"
        ) from e
    # Alive after its start time was read, so that was its own and no successor's.
    if process.is_dead:
        process.close()
        raise NotAllowed(
            f"process {pid}, which connected, is dead: whoever has its connection now attaches "
            "by itself",
            reason="dead_process",
        )
    return process


def start_ticks(pid: int) -> int:
    """When the process that has this id now was started. Raises OSError when there is none."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        text = file.read()
    # The second field is the command's name in parentheses, which may have any characters in it.
    return int(text[text.rindex(b")") + 2 :].split()[19])


def _peer_pidfd(connection: socket.socket) -> int:
    """-1: this kernel has no such option. Raises OSError, ESRCH when the process is gone."""
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, struct.calcsize("i"))
    except OSError as e:
        if e.errno == errno.ENOPROTOOPT:
            return -1
        raise
    (pidfd,) = struct.unpack("i", raw)
    return int(pidfd)


def _opened_pidfd(pid: int) -> int:
    """For kernels that keep no pidfd with a connection: of the process that has the id, if that
    did not change hands meanwhile."""
    before = start_ticks(pid)
    pidfd = os.pidfd_open(pid)
    if start_ticks(pid) != before:
        os.close(pidfd)
        raise ProcessLookupError(errno.ESRCH, "its id has been given to another process")
    return pidfd


def _peer_groups(connection: socket.socket) -> frozenset[int]:
    """Supplementary groups at the time of connecting. None are seen of who is in more than
    MAX_GROUPS, which can only refuse somebody."""
    size = struct.calcsize("I")
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MAX_GROUPS * size)
    except OSError:
        return frozenset()
    return frozenset(struct.unpack(f"{len(raw) // size}I", raw))
