"""A read-only way to memory that this process writes, to hand to processes of other users."""

from __future__ import annotations

import os


def read_only(fd: int) -> int:
    """A new descriptor of the memfd `fd`, open for reading only; the caller closes it.

    A description that was opened for writing stays so wherever it is sent, so this one is opened
    anew. Its receiver could open the file once more, through /proc/self/fd, as the file's mode
    permits: so the mode is the owner's to read, and nobody else's. That stops every user but the
    daemon's own and root. What is open or mapped here already stays writable.
    """
    os.fchmod(fd, 0o400)
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
