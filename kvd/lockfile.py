"""One daemon a socket directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

LOCK_FILE = "kvd.lock"


class AlreadyRunning(Exception):
    """Another daemon owns the sockets; `pid` is its process, None if it cannot be read."""

    def __init__(self, socket_dir: Path, pid: int | None) -> None:
        holder = f"pid {pid}" if pid else "a process that has not written its pid yet"
        super().__init__(
            f"another kvd ({holder}) already serves {socket_dir}: stop it, "
            "or give this one its own --socket-dir"
        )
        self.pid = pid


class DaemonLock:
    """Held from construction to `release`, or to the end of the process however it ends.

    Take it before touching the sockets: those of a dead daemon can then be replaced without
    asking whose they are.
    """

    def __init__(self, socket_dir: Path) -> None:
        """`socket_dir` must exist. Raises AlreadyRunning, or OSError when it is not writable."""
        self._fd = os.open(
            socket_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(self._fd, 32, 0).strip()
            os.close(self._fd)
            raise AlreadyRunning(socket_dir, int(text) if text.isdigit() else None) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Idempotent. The file stays: removing it would let two daemons lock two files."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.ftruncate(fd, 0)
            os.close(fd)

    def __enter__(self) -> DaemonLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
