"""A pool's memory in this process's address space, twice: to read from and to write to."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence

POOL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_PROT_NONE = 0
_MAP_FIXED = 0x10  # Linux; Python's own mmap offers neither this nor an address
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class BadPoolMemory(Exception):
    """The memory handed over is not the sealed pool that was announced; nothing is mapped."""


class PoolMapping:
    """All chunks of a pool, contiguous, mapped read-only at `read_address` and writable at
    `write_address`; `num_bytes` bytes each.

    Attention reads through the first mapping and KV is written through the second, so a stray
    write through a read pointer faults (SIGSEGV) the process that made it and no other.

    A forked child has neither mapping: the daemon frees what a session was writing when the
    session's process is dead, and a child that outlives it must not be able to write on. A child
    that needs the pool attaches by itself.
    """

    def __init__(self, read_address: int, write_address: int, num_bytes: int, reserved: int):
        """Use `attach`."""
        self.read_address = read_address
        self.write_address = write_address
        self.num_bytes = num_bytes
        self._reserved = reserved  # bytes mapped at each address; 0 once closed
        self._pid = os.getpid()

    @classmethod
    def attach(cls, fds: Sequence[int], chunk_bytes: Sequence[int], total: int) -> PoolMapping:
        """Maps the chunks behind `fds`, of `chunk_bytes[i]` bytes each, as `total` bytes.

        The fds stay the caller's, who can close them at once. Raises BadPoolMemory when a chunk
        has another size, could still be resized (reading behind a cut is a SIGBUS), or when
        the chunks are less than `total`.
        """
        _check(fds, chunk_bytes, total)
        read = _map_chunks(fds, chunk_bytes, mmap.PROT_READ)
        try:
            write = _map_chunks(fds, chunk_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            _libc.munmap(read, sum(chunk_bytes))
            raise
        return cls(read, write, total, sum(chunk_bytes))

    def read_view(self) -> memoryview:
        """The pool's bytes, read-only. Valid until `close`, which does not see who has a view."""
        return _view(self.read_address, self.num_bytes).toreadonly()

    def write_view(self) -> memoryview:
        """The same bytes, writable. Valid until `close`, which does not see who has a view."""
        return _view(self.write_address, self.num_bytes)

    def close(self) -> None:
        """Unmaps both; addresses and views must not be used any more. Idempotent."""
        reserved, self._reserved = self._reserved, 0
        if reserved and os.getpid() == self._pid:  # in a forked child nothing is mapped there
            _libc.munmap(self.read_address, reserved)
            _libc.munmap(self.write_address, reserved)


def map_read_only(fd: int, offset: int, num_bytes: int) -> int:
    """The address of a part of another memory than the pool's; whole pages. `unmap` it."""
    return _mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)


def unmap(address: int, num_bytes: int) -> None:
    _libc.munmap(address, num_bytes)


def _check(fds: Sequence[int], chunk_bytes: Sequence[int], total: int) -> None:
    if len(fds) != len(chunk_bytes) or not fds:
        raise BadPoolMemory(f"{len(fds)} fds came for {len(chunk_bytes)} chunks")
    if not 0 < total <= sum(chunk_bytes):
        raise BadPoolMemory(f"chunks of {sum(chunk_bytes)} bytes cannot hold {total} bytes")
    for number, (fd, announced) in enumerate(zip(fds, chunk_bytes, strict=True)):
        try:
            size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as e:
            raise BadPoolMemory(f"chunk {number} is no memfd: {e.strerror}") from e
        if size != announced or size % mmap.PAGESIZE:
            raise BadPoolMemory(
                f"chunk {number} has {size} bytes; announced were {announced}, "
                f"and it must be a multiple of {mmap.PAGESIZE}"
            )
        if seals & POOL_SEALS != POOL_SEALS:
            raise BadPoolMemory(
                f"chunk {number} is not sealed (seals {seals:#x}, wanted {POOL_SEALS:#x})"
            )


def _map_chunks(fds: Sequence[int], chunk_bytes: Sequence[int], prot: int) -> int:
    """The address of all chunks, one behind the other."""
    total = sum(chunk_bytes)
    anywhere = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    base = _mmap(None, total, _PROT_NONE, anywhere, -1)
    try:
        address = base
        for fd, size in zip(fds, chunk_bytes, strict=True):
            _mmap(address, size, prot, mmap.MAP_SHARED | _MAP_FIXED, fd)
            address += size
        # DONTDUMP: a worker's core file is not the place for everybody's prompts
        for advice in (mmap.MADV_DONTFORK, mmap.MADV_DONTDUMP):
            if _libc.madvise(base, total, advice):
                raise _os_error("madvise", total)
    except BaseException:
        _libc.munmap(base, total)
        raise
    return base


def _mmap(address: int | None, size: int, prot: int, flags: int, fd: int, offset: int = 0) -> int:
    result = _libc.mmap(address, size, prot, flags, fd, offset)
    if result is None or result == _MAP_FAILED:
        raise _os_error("mmap", size)
    return int(result)


def _os_error(call: str, size: int) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call} of {size} bytes: {os.strerror(number)}")


def _view(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
