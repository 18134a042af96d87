"""Digests of files, remembered from one start to the next, so that not all weights are read again.

What a digest rests on: a file whose device, inode, size, mtime and ctime are what they were has the
content that it had. ctime is what makes it so, for no program can set it back. That does not hold
where the clock steps back, where a file system keeps no ctime, and for who goes on writing through
a mapping that is dirty already. Weights are written once and served later; a file that has just
changed is not remembered. Without the cache nothing is lost but time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from kvd_shared.digest_file import CacheRefused, Entries, FileState, load, opened, replace

log = structlog.get_logger()


def default_cache_dir(env: Mapping[str, str]) -> Path | None:
    """`$CACHE_DIRECTORY` (a systemd unit's), `$XDG_CACHE_HOME/kvd` or `~/.cache/kvd`.

    None when nothing of that is set. The XDG specification has relative paths ignored.
    """
    unit = Path(env.get("CACHE_DIRECTORY", "").partition(":")[0])
    if unit.is_absolute():
        return unit
    for base in (Path(env.get("XDG_CACHE_HOME", "")), Path(env.get("HOME", "")) / ".cache"):
        if base.is_absolute():
            return base / "kvd"
    return None


class DigestCache:
    """Invariant: an entry was computed from a file in the state that it names, at a time when no
    later change could leave that state as it is.

    A cache that cannot be used is an empty one: the reason is logged, nothing fails.
    """

    def __init__(self, directory: Path | None, clock_ns: Callable[[], int] = time.time_ns) -> None:
        """`clock_ns` gives the time that files are stamped with, Unix time in ns."""
        self.directory = directory
        self.num_hits = 0
        self._clock_ns = clock_ns
        self._entries: Entries = {}
        if directory is None:
            self._off("none of CACHE_DIRECTORY, XDG_CACHE_HOME and HOME is an absolute path")
            return
        try:
            with opened(directory) as fd:
                self._entries = load(fd)
        except FileNotFoundError:
            pass  # the first start
        except (CacheRefused, OSError) as e:
            self._off(_why(directory, e))

    def digest(self, fd: int, compute: Callable[[], bytes]) -> bytes:
        """The digest of the open file: remembered, or else what `compute` says, which reads it."""
        state = FileState.of(fd)
        settled = state.settled(self._clock_ns())  # before anything is read
        known, digest = self._entries.get((state.device, state.inode), (None, b""))
        if settled and known == state:
            self.num_hits += 1
            return digest
        digest = compute()
        if settled and state == FileState.of(fd):
            self._remember(state, digest)
        return digest

    def _remember(self, state: FileState, digest: bytes) -> None:
        """At once, for the next file may be a minute of reading that somebody interrupts.

        Of two processes that write at the same moment one may lose its line, and computes it again
        at its next start."""
        if self.directory is None:
            return
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with opened(self.directory) as fd:
                self._entries = load(fd)  # others may have written since
                self._entries.pop((state.device, state.inode), None)  # the youngest goes last
                self._entries[state.device, state.inode] = state, digest
                replace(fd, self._entries)
        except (CacheRefused, OSError) as e:
            self._off(_why(self.directory, e))

    def _off(self, why: str) -> None:
        """From here on nothing is looked up or written."""
        log.warning("digests.cache_off", why=why, effect="all weights are read at each start")
        self.directory = None
        self._entries = {}


def _why(directory: Path, error: CacheRefused | OSError) -> str:
    return f"{directory}: {error.strerror if isinstance(error, OSError) else error}"
