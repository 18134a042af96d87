"""A pool's memory on a CPU: a few sealed memfds that other processes map."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

from kvd.available_memory import available_bytes
from kvd_shared.layout import PoolLayout
from kvd_shared.mapping import POOL_SEALS
from kvd_shared.sizes import format_bytes

MAX_CHUNKS = 64  # all fds of a pool travel in one message, which carries 253
MIN_CHUNK_BYTES = 64 << 20


class PoolTooLarge(Exception):
    """The machine, or a limit set on this process, has not the memory that a pool asks for."""


class PoolMismatch(Exception):
    """Memory that was kept is not the memory of the pool that is configured."""


class MemfdPool:
    """`num_pages` pages of `layout` in zeroed shared memory.

    The memory exists while anyone holds one of `fds` or a mapping of it, so it outlives this
    process wherever the fds were passed to. It is allocated here, not at first touch: later a
    shortage would be a SIGBUS in whichever worker writes next. The sizes are sealed, so nobody
    who has an fd can cut the memory under the others' mappings.
    """

    def __init__(self, layout: PoolLayout, num_pages: int) -> None:
        """New memory. Raises PoolTooLarge, having kept nothing."""
        self._describe(layout, num_pages)
        allowed = available_bytes()
        if self.num_bytes > allowed:
            raise PoolTooLarge(self._explain(f"{format_bytes(allowed)} are available"))
        try:
            for size in self.chunk_bytes:
                self.fds += (_sealed_memfd(size),)
        except OSError as e:
            self.close()
            raise PoolTooLarge(self._explain(e.strerror or str(e))) from e

    @classmethod
    def adopt(cls, layout: PoolLayout, num_pages: int, fds: Sequence[int]) -> MemfdPool:
        """The pool whose memory is behind `fds`, with what is in it; they are the pool's from then
        on. Raises PoolMismatch for fds that such a pool cannot have; they stay the caller's.

        Whether the bytes are those of this layout and model, the sizes do not tell: ask the
        metadata.
        """
        pool = cls.__new__(cls)
        pool._describe(layout, num_pages)
        _check_chunks(fds, pool.chunk_bytes)
        pool.fds = tuple(fds)
        return pool

    def _describe(self, layout: PoolLayout, num_pages: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.num_bytes = num_pages * layout.page_bytes
        self.chunk_bytes = chunk_sizes(self.num_bytes)  # of each fd; pages may span two chunks
        self.fds: tuple[int, ...] = ()
        self.survival = "none"  # who keeps the memory when this process dies: see survival.py

    def close(self) -> None:
        """Drops this process's fds. Idempotent."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)

    def _explain(self, reason: str) -> str:
        return (
            f"a pool of {self.num_pages} pages of {format_bytes(self.layout.page_bytes)} needs "
            f"{format_bytes(self.num_bytes)}: {reason}; make the pool's size smaller"
        )


def chunk_sizes(num_bytes: int) -> tuple[int, ...]:
    """Sizes of the chunks that hold `num_bytes`: equal, but for a smaller last one."""
    size = max(MIN_CHUNK_BYTES, _align(-(-num_bytes // MAX_CHUNKS)))
    full, rest = divmod(num_bytes, size)
    return (size,) * full + ((_align(rest),) if rest else ())


def _check_chunks(fds: Sequence[int], sizes: Sequence[int]) -> None:
    if len(fds) != len(sizes):
        raise PoolMismatch(f"{len(fds)} chunks were kept, the pool has {len(sizes)}")
    seen: set[tuple[int, int]] = set()
    for number, (fd, size) in enumerate(zip(fds, sizes, strict=True)):
        try:
            stat, seals = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as e:
            raise PoolMismatch(f"chunk {number} is no memfd: {e.strerror}") from e
        if stat.st_size != size or stat.st_blocks * 512 != size:
            raise PoolMismatch(
                f"chunk {number} has {stat.st_size} bytes, {stat.st_blocks * 512} of them there; "
                f"the pool's has {size}"
            )
        if seals != POOL_SEALS:  # one more, against writing, would do as much harm as one less
            raise PoolMismatch(f"chunk {number} has seals {seals:#x}, a pool's has {POOL_SEALS:#x}")
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise PoolMismatch(f"chunk {number} is not open for reading and writing")
        if (stat.st_dev, stat.st_ino) in seen:
            raise PoolMismatch(f"chunk {number} is the memory of another chunk")
        seen.add((stat.st_dev, stat.st_ino))


def _sealed_memfd(size: int) -> int:
    fd = os.memfd_create("kvd-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, POOL_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _align(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
