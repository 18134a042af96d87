"""The file that remembers digests: a line with its format and the digest of all other lines, then a
line a file: device, inode, bytes, mtime and ctime (ns), SHA-256.

Whoever can write it could lie about a digest, and so make KV of one model pass for another's. So it
and its directory must belong to this process's user and be writable by nobody else.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import structlog

DIGEST_FILE = "digests"
FORMAT = "kvd-digests-1"
MAX_ENTRIES = 1024  # the largest models have 200 files
MAX_FILE_BYTES = 256 * (MAX_ENTRIES + 1)  # a line has at most 165
RACY_NS = 2_000_000_000  # the coarsest timestamps there are (FAT): within them a change hides

log = structlog.get_logger()


class CacheRefused(Exception):
    """Somebody else could have written the file: whose it is, and what would do."""


class FileState(NamedTuple):
    """What is known of a file without reading it."""

    device: int
    inode: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, fd: int) -> FileState:
        """By descriptor: on NFS it is the opening that asks the server for the truth."""
        s = os.fstat(fd)
        return cls(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)

    def settled(self, now_ns: int) -> bool:
        """False while a further change could leave the times as they are."""
        return now_ns - max(self.mtime_ns, self.ctime_ns) > RACY_NS


Entries = dict[tuple[int, int], tuple[FileState, bytes]]  # by device and inode; oldest first


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """A descriptor of the directory, which stays the one that was checked."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _refuse_strangers(os.fstat(fd), "the directory")
        yield fd
    finally:
        os.close(fd)


def _refuse_strangers(s: os.stat_result, what: str) -> None:
    if s.st_uid != os.geteuid():
        raise CacheRefused(
            f"{what} belongs to uid {s.st_uid}, this process is uid {os.geteuid()}: "
            "set XDG_CACHE_HOME to a directory of your own"
        )
    if s.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheRefused(
            f"{what} has mode {s.st_mode & 0o7777:04o}, others may write it: chmod go-w"
        )


def load(directory: int) -> Entries:
    """What the file holds; nothing, said in the log, when it is damaged. Raises CacheRefused,
    OSError."""
    try:
        fd = os.open(
            DIGEST_FILE,
            os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
            dir_fd=directory,
        )
    except FileNotFoundError:
        return {}
    with open(fd, "rb") as file:
        _refuse_strangers(os.fstat(fd), f"the file {DIGEST_FILE}")
        raw = file.read(MAX_FILE_BYTES + 1)
    try:
        return _decoded(raw)
    except ValueError as e:
        log.warning("digests.cache_damaged", why=str(e), effect="its digests are computed again")
        return {}


def replace(directory: int, entries: Entries) -> None:
    """Readers see the old file or the new one, never half of one."""
    temporary = f"{DIGEST_FILE}.{secrets.token_hex(8)}"
    fd = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory
    )
    try:
        with open(fd, "wb") as file:
            file.write(_encoded(entries))
        os.rename(temporary, DIGEST_FILE, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _encoded(entries: Entries) -> bytes:
    kept = list(entries.values())[-MAX_ENTRIES:]
    lines = [f"{' '.join(map(str, state))} {digest.hex()}\n" for state, digest in kept]
    body = "".join(lines).encode()
    return _first_line(body) + body


def _first_line(body: bytes) -> bytes:
    return f"{FORMAT} {hashlib.sha256(body).hexdigest()}\n".encode()


def _decoded(raw: bytes) -> Entries:
    """Raises ValueError."""
    first, newline, body = raw.partition(b"\n")
    if len(raw) > MAX_FILE_BYTES or first + newline != _first_line(body):
        raise ValueError(f"it is not a whole file that begins with {FORMAT!r} and a right digest")
    entries: Entries = {}
    for line in body.decode().splitlines():
        device, inode, num_bytes, mtime_ns, ctime_ns, digest = line.split()
        state = FileState(int(device), int(inode), int(num_bytes), int(mtime_ns), int(ctime_ns))
        entries[state.device, state.inode] = state, bytes.fromhex(digest)
    return entries
