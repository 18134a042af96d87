"""The metadata of one pool as a whole: made anew, in plain memory or in a memfd, or taken over."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np

from kvd.metadata.cold import ColdStart
from kvd.metadata.geometry import HEADER_BYTES, Geometry, Places, places
from kvd.metadata.header import Header
from kvd.metadata.page_states import PageStates
from kvd.metadata.records import Records, row_words
from kvd.metadata.roots import ROOT_BYTES, RootTable
from kvd.metadata.sessions import SESSION_BYTES, SessionTable
from kvd.metadata.weights import WEIGHTS_BYTES, WeightsTable
from kvd_shared.mapping import POOL_SEALS

MEMORY_POOL_ID = "0" * 16  # of what no other process ever sees


class Metadata:
    """One writer: the daemon. What the cache core does, it tells these parts before it answers."""

    def __init__(self, memory: Any, geometry: Geometry, fd: int = -1) -> None:
        """`memory`: any writable buffer of `metadata_bytes(geometry)` bytes. `fd`: of it, owned by
        this from now on."""
        self.geometry = geometry
        self.places: Places = places(geometry)
        self.fd = fd
        self._memory = memory
        at, pages = self.places, geometry.num_pages
        self.header = Header(memoryview(memory).cast("B")[:HEADER_BYTES])
        self.pages = PageStates(
            np.frombuffer(memory, np.int64, pages, at.current),
            np.frombuffer(memory, np.uint64, pages, at.owner),
            geometry.recorded,
        )
        self.records = Records(
            _table(memory, at.rows, at.num_rows, row_words(geometry.page_size) * 8),
            geometry.page_size,
            self.pages,
        )
        self.roots = RootTable(_table(memory, at.roots, at.num_roots, ROOT_BYTES))
        self.weights = WeightsTable(_table(memory, at.weights, geometry.num_weights, WEIGHTS_BYTES))
        self.sessions = SessionTable(
            _table(memory, at.sessions, geometry.num_sessions, SESSION_BYTES),
            at.sessions,
            self.header,
        )

    @classmethod
    def in_memory(cls, num_pages: int, page_size: int, *, recorded: bool = True) -> Metadata:
        """In plain memory, which ends with this process."""
        geometry = Geometry(num_pages=num_pages, page_size=page_size, recorded=recorded)
        return cls.new(geometry, MEMORY_POOL_ID)

    @classmethod
    def new(cls, geometry: Geometry, pool_id: str, memory: Any = None, fd: int = -1) -> Metadata:
        """Of a pool of which nothing is known yet; in plain memory where none, of zeros, is
        given."""
        if memory is None:
            memory = np.zeros(places(geometry).num_bytes // 8, dtype=np.uint64)
        meta = cls(memory, geometry, fd)
        meta.pages.all_free()
        meta.header.write(geometry, pool_id)
        return meta

    @property
    def sessions_region(self) -> tuple[int, int]:
        """Offset and size in bytes of the sessions table: whole memory pages."""
        return self.places.sessions, self.places.sessions_bytes

    def to_bytes(self) -> bytes:
        """A copy of everything; for tests."""
        return bytes(self._memory)

    def close(self) -> None:
        """Drop the fd, if there is one. The mapping ends with the last array that shows it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def create_metadata(geometry: Geometry, pool_id: str) -> Metadata:
    """In a new memfd of sealed size, at epoch 1. `pool_id`: 16 hexadecimal digits. Raises OSError
    where there is not enough memory."""
    size = places(geometry).num_bytes
    fd = os.memfd_create("kvd-metadata", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, POOL_SEALS)
        return Metadata.new(geometry, pool_id, mmap.mmap(fd, size), fd)
    except BaseException:
        os.close(fd)
        raise


def open_metadata(fd: int, geometry: Geometry) -> Metadata:
    """Take over what another daemon left behind `fd`, which is the metadata's from now on. The
    epoch has then been raised by one, and this start counts as failed until
    `header.warm_start_done()`.

    Raises ColdStart on any doubt; the fd stays the caller's then. What the tables and pages say is
    checked later, by `kvd.metadata.scan`.
    """
    size = places(geometry).num_bytes
    try:
        there = os.fstat(fd).st_size
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as e:
        raise ColdStart("no_metadata", f"fd {fd} is no memfd: {e.strerror}") from e
    if there != size:
        raise ColdStart("geometry", f"the metadata has {there} bytes; this pool's has {size}")
    if seals & POOL_SEALS != POOL_SEALS:
        raise ColdStart("no_metadata", "the metadata's size is not sealed")
    meta = Metadata(mmap.mmap(fd, size), geometry, fd)
    meta.header.check(geometry)
    meta.header.warm_start_begins()
    return meta


def _table(memory: Any, offset: int, count: int, entry_bytes: int) -> Any:
    words = entry_bytes // 8
    return np.frombuffer(memory, np.uint64, count * words, offset).reshape(count, words)
