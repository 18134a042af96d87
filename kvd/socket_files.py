"""Socket files that nobody else may open, not even between their making and their mode."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from kvd.config_error import ConfigError

DIRECTORY_MODE = 0o750
SOCKET_MODE = 0o660


def prepare_socket_dir(directory: Path) -> None:
    """Make the directory if there is none, with mode 0750 whatever the umask is.

    Raises ConfigError for one in which somebody else could put a socket of theirs in the place of
    ours: clients would hand them their prompts.
    """
    if not directory.exists():
        with masked(0o022):
            directory.parent.mkdir(parents=True, exist_ok=True)
        with made_private():
            directory.mkdir()
        directory.chmod(DIRECTORY_MODE)
    real = Path(os.path.realpath(directory))
    found = real.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"socket_dir {directory} is not a directory")
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"socket_dir {directory} belongs to user {found.st_uid}, the daemon is user "
            f"{os.geteuid()}: its owner could replace the sockets; choose a directory of the "
            "daemon's own"
        )
    if found.st_mode & 0o022:
        raise ConfigError(
            f"socket_dir {directory} has mode {found.st_mode & 0o7777:04o}: others may write there "
            f"and could replace the sockets; chmod {DIRECTORY_MODE:04o} it"
        )
    for above in real.parents:
        mode = above.stat().st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:
            raise ConfigError(
                f"socket_dir {directory} is below {above}, which everybody may write (mode "
                f"{mode & 0o7777:04o}) and so could replace what is in it; choose another place"
            )


def made_private() -> AbstractContextManager[None]:
    """What is made meanwhile is the daemon's alone: a mode that is set afterwards comes too late
    for who was quicker."""
    return masked(0o077)


@contextmanager
def masked(mask: int) -> Iterator[None]:
    """With this umask, which is one of the whole process."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def share_with_group(path: Path) -> None:
    """Let the group of the socket's directory open the socket, and nobody else; the daemon's own
    group where it is in no such one."""
    group = path.parent.stat().st_gid
    if path.stat().st_gid != group:
        with suppress(PermissionError):
            os.chown(path, -1, group)
    path.chmod(SOCKET_MODE)
