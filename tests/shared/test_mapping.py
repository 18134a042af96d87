import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.page_pool import MemfdPool
from kvd_shared.layout import PoolLayout
from kvd_shared.mapping import POOL_SEALS, BadPoolMemory, PoolMapping

LAYOUT = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=5, page_size=8, dtype="float32")
NUM_PAGES = 80  # of 320 bytes: 6.25 pages of memory


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemfdPool]:
    """A pool of many chunks, whose pages span chunk boundaries."""
    monkeypatch.setattr("kvd.page_pool.MIN_CHUNK_BYTES", 8192)
    pool = MemfdPool(LAYOUT, NUM_PAGES)
    assert len(pool.fds) == 4
    yield pool
    pool.close()


@pytest.fixture
def mapping(pool: MemfdPool) -> Iterator[PoolMapping]:
    mapping = PoolMapping.attach(pool.fds, pool.chunk_bytes, pool.num_bytes)
    yield mapping
    mapping.close()


def run_attached(pool: MemfdPool, code: str) -> int:
    """Run `code` with a `mapping` of the pool in another process; returns its exit status."""
    ours, theirs = socket.socketpair()
    prelude = f"""
        import ctypes, os, resource, socket
        from kvd_shared.mapping import PoolMapping
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        connection = socket.socket(fileno={theirs.fileno()})
        _, fds, _, _ = socket.recv_fds(connection, 1, 64)
        mapping = PoolMapping.attach(fds, {pool.chunk_bytes}, {pool.num_bytes})
        for fd in fds:
            os.close(fd)
    """
    with ours, theirs:
        socket.send_fds(ours, [b"x"], list(pool.fds))
        script = textwrap.dedent(prelude) + textwrap.dedent(code)
        command = [sys.executable, "-c", script]
        return subprocess.run(command, pass_fds=[theirs.fileno()], timeout=30).returncode


def test_the_chunks_are_contiguous_and_both_views_are_the_same_memory(
    mapping: PoolMapping,
) -> None:
    assert len(mapping.read_view()) == len(mapping.write_view()) == NUM_PAGES * LAYOUT.page_bytes
    assert mapping.read_address != mapping.write_address
    mapping.write_view()[8190:8194] = b"kvd!"  # across a chunk boundary
    assert bytes(mapping.read_view()[8190:8194]) == b"kvd!"
    assert ctypes.string_at(mapping.read_address + 8190, 4) == b"kvd!"


def test_two_processes_share_the_bytes(pool: MemfdPool, mapping: PoolMapping) -> None:
    mapping.write_view()[0:3] = b"abc"
    status = run_attached(
        pool,
        """
        assert mapping.read_view()[0:3] == b"abc"
        mapping.write_view()[-3:] = b"xyz"
        """,
    )
    assert status == 0
    assert bytes(mapping.read_view()[-3:]) == b"xyz"


def test_a_write_through_the_read_mapping_kills_only_its_process(
    pool: MemfdPool, mapping: PoolMapping
) -> None:
    mapping.write_view()[0:3] = b"abc"
    status = run_attached(pool, "ctypes.memset(mapping.read_address, 255, 1)")
    assert status == -signal.SIGSEGV
    mapping.write_view()[3:4] = b"d"
    assert bytes(mapping.read_view()[0:4]) == b"abcd"


def test_python_refuses_to_write_into_the_read_view(mapping: PoolMapping) -> None:
    with pytest.raises(TypeError):
        mapping.read_view()[0] = 1


@pytest.mark.parametrize("address", ["read_address", "write_address"])
def test_a_forked_child_has_neither_mapping(pool: MemfdPool, address: str) -> None:
    """Its parent's death frees pages; a child that could still write them would corrupt others'."""
    status = run_attached(
        pool,
        f"""
        child = os.fork()
        if not child:
            ctypes.string_at(mapping.{address}, 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        mapping.write_view()[0:1] = b"p"  # the parent has it still
        os._exit(os.WTERMSIG(status))
        """,
    )
    assert status == signal.SIGSEGV


def test_close_in_a_forked_child_leaves_alone_what_lies_there_now(pool: MemfdPool) -> None:
    status = run_attached(
        pool,
        """
        import mmap
        from kvd_shared.mapping import _MAP_FIXED, _mmap
        child = os.fork()
        if not child:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            _mmap(mapping.read_address, 4096, mmap.PROT_READ, flags, -1)
            mapping.close()
            ctypes.string_at(mapping.read_address, 1)
            os._exit(7)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    )
    assert status == 7


def test_the_memory_outlives_its_creator(pool: MemfdPool, mapping: PoolMapping) -> None:
    mapping.write_view()[0:3] = b"abc"
    pool.close()
    assert bytes(mapping.read_view()[0:3]) == b"abc"


def test_close_unmaps_once(pool: MemfdPool) -> None:
    mapping = PoolMapping.attach(pool.fds, pool.chunk_bytes, pool.num_bytes)
    address = f"{mapping.read_address:x}-"
    assert address in Path("/proc/self/maps").read_text()
    mapping.close()
    mapping.close()
    assert address not in Path("/proc/self/maps").read_text()


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_memory_that_could_be_resized_is_refused(missing: int) -> None:
    fd = memfd(4096, POOL_SEALS & ~missing)
    with pytest.raises(BadPoolMemory, match="not sealed"):
        PoolMapping.attach([fd], [4096], 4096)
    os.close(fd)


@pytest.mark.parametrize(
    ("size", "announced", "total", "message"),
    [
        (4096, 8192, 8192, "has 4096 bytes; announced were 8192"),
        (8192, 4096, 4096, "has 8192 bytes; announced were 4096"),
        (5000, 5000, 5000, "multiple of"),
        (4096, 4096, 4097, "of 4096 bytes cannot hold 4097"),
        (4096, 4096, 0, "cannot hold 0"),
    ],
)
def test_wrong_sizes_are_refused(size: int, announced: int, total: int, message: str) -> None:
    fd = memfd(size, POOL_SEALS)
    with pytest.raises(BadPoolMemory, match=message):
        PoolMapping.attach([fd], [announced], total)
    os.close(fd)


def test_a_file_and_a_missing_fd_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, pytest.raises(BadPoolMemory, match="no memfd"):
        PoolMapping.attach([file.fileno()], [4096], 4096)
    with pytest.raises(BadPoolMemory, match="0 fds came for 1 chunks"):
        PoolMapping.attach([], [4096], 4096)
