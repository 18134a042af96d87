"""Where the daemon's sockets are, for the daemon and for whoever looks for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SOCKET_DIR_VARIABLE = "KVD_SOCKET_DIR"
MAX_SOCKET_PATH_BYTES = 107  # sun_path has 108, one of them for the final zero
_LONGEST_NAME = "lease.sock"  # of the files that the daemon makes in there


class NoSocketDir(ValueError):
    """Nothing says where the sockets are."""


def default_socket_dir(env: Mapping[str, str], uid: int | None = None) -> Path:
    """`$KVD_SOCKET_DIR`, else `/run/kvd` for root and `$XDG_RUNTIME_DIR/kvd` for others.

    Raises NoSocketDir when nothing of that is known: a guess like /tmp could be anybody's.
    """
    if env.get(SOCKET_DIR_VARIABLE):
        return Path(env[SOCKET_DIR_VARIABLE])
    if (os.getuid() if uid is None else uid) == 0:
        return Path("/run/kvd")
    if env.get("XDG_RUNTIME_DIR"):
        return Path(env["XDG_RUNTIME_DIR"]) / "kvd"
    raise NoSocketDir(
        f"no place for the sockets: neither {SOCKET_DIR_VARIABLE} nor XDG_RUNTIME_DIR is set"
    )


def check_socket_dir(directory: Path) -> None:
    """Raises ValueError when a socket's path in there would be longer than the kernel takes."""
    longest = os.path.abspath(directory / _LONGEST_NAME)
    size = len(os.fsencode(longest))
    if size > MAX_SOCKET_PATH_BYTES:
        raise ValueError(
            f"is too long for a socket: {longest} has {size} bytes, "
            f"the limit is {MAX_SOCKET_PATH_BYTES}"
        )
