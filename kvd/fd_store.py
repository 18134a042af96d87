"""Memory that outlives this process: fds which the service manager keeps, by name.

A manager hands them back at the next start as fds 3, 4, …, with LISTEN_FDS (how many),
LISTEN_FDNAMES and LISTEN_PID (for whom). sd_listen_fds(3)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping

import structlog

from kvd_shared.notify import NotifySocket

FIRST_FD = 3
LISTEN_VARIABLES = ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID")

log = structlog.get_logger()


class FdStore:
    """What came back from the manager, and what it keeps.

    Invariant: an fd in `_received` is this object's to close; `take` gives it away. Without a
    manager nothing came back, and storing and removing do nothing.
    """

    def __init__(self, manager: NotifySocket | None, received: Mapping[str, list[int]]) -> None:
        self._manager = manager
        self._received = {name: list(fds) for name, fds in received.items()}

    def names(self) -> list[str]:
        """Of what came back and was not taken."""
        return list(self._received)

    def take(self, name: str) -> int | None:
        """The fd of that name, the caller's from now on; None when there is none, or several:
        which of them is meant cannot be known."""
        if len(self._received.get(name, ())) != 1:
            return None
        return self._received.pop(name)[0]

    def store(self, fds: Mapping[str, int]) -> None:
        """The manager has all of them when this returns. They stay the caller's, too. Raises
        NotifyFailed."""
        if self._manager is not None and fds:
            for name, fd in fds.items():
                self._manager.store(name, fd)
            self._manager.barrier()

    def remove(self, names: Iterable[str]) -> None:
        """Nobody keeps anything of these names any more when this returns: the manager does not,
        and what came back is closed. What was taken is the caller's to close before. Raises
        NotifyFailed."""
        gone = list(names)
        self.discard(gone)
        if self._manager is not None and gone:
            for name in gone:
                self._manager.remove(name)
            self._manager.barrier()

    def close(self) -> None:
        """Closes what came back and nobody took; the manager keeps its own. Idempotent."""
        self.discard(self.names())

    def discard(self, names: Iterable[str]) -> None:
        """Closes what came back under these names; the manager keeps its own."""
        for name in names:
            for fd in self._received.pop(name, ()):
                os.close(fd)


def received_fds(env: MutableMapping[str, str], first: int = FIRST_FD) -> dict[str, list[int]]:
    """The fds that the manager handed to this process, by name, with close-on-exec set.

    The variables are taken out of `env`: they are for this process, not for its children. What is
    for another process, or makes no sense, is left alone and logged: whose fds these numbers are
    is not known then.
    """
    count, names, pid, _ = (env.pop(variable, "") for variable in LISTEN_VARIABLES)
    if not count or pid != str(os.getpid()):
        if count:
            log.info("fds.not_ours", listen_pid=pid, pid=os.getpid())
        return {}
    split = names.split(":") if names else []
    if not count.isdecimal() or int(count) != len(split):
        log.warning("fds.refused", listen_fds=count, names=len(split),
                    why="LISTEN_FDS must be the number of LISTEN_FDNAMES")  # fmt: skip
        return {}
    found: dict[str, list[int]] = {}
    for fd, name in enumerate(split, first):
        try:
            os.set_inheritable(fd, False)
        except OSError as e:
            log.warning("fds.absent", name=name, fd=fd, error=e.strerror)
        else:
            found.setdefault(name, []).append(fd)
    return found
