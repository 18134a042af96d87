"""How a worker sees that its session is over, whether or not a daemon is there to tell it.

The daemon stores it in memory that the worker maps, before it gives away the first page that the
worker has held. So a worker that looks after it has read, and before it uses what it has read,
never uses what it read from a page that was another's by then.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from kvd_shared.lease import FenceOffer
from kvd_shared.mapping import POOL_SEALS, BadPoolMemory, map_read_only, unmap

WORD_BYTES = 8


class Fence:
    """One word of the daemon's metadata, mapped read-only. Looking at it is one load."""

    def __init__(self, fd: int, offer: FenceOffer) -> None:
        """The fd stays the caller's. Raises BadPoolMemory for one that is not sealed, or too
        short."""
        at = offer.offset
        try:
            size = os.fstat(fd).st_size
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as e:
            raise BadPoolMemory(f"the metadata is no memfd: {e.strerror}") from e
        if seals & POOL_SEALS != POOL_SEALS:
            raise BadPoolMemory(f"the metadata is not sealed (seals {seals:#x})")
        if at % WORD_BYTES or not 0 <= at < size:
            raise BadPoolMemory(f"the metadata has {size} bytes, and no word at {at}")
        start = at - at % mmap.PAGESIZE
        self._address = map_read_only(fd, start, mmap.PAGESIZE)
        self._word = ctypes.c_uint64.from_address(self._address + at - start)
        self._live = offer.live_word

    @property
    def is_up(self) -> bool:
        """The session is over: discard the step, unmap, attach again."""
        return self._word.value != self._live

    def close(self) -> None:
        """It is up from now on. Idempotent."""
        address, self._address = self._address, 0
        if address:
            self._word = ctypes.c_uint64(~self._live & (1 << 64) - 1)
            unmap(address, mmap.PAGESIZE)
