import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd import available_memory
from kvd.page_pool import MAX_CHUNKS, MemfdPool, PoolMismatch, PoolTooLarge, chunk_sizes
from kvd_shared.layout import PoolLayout
from kvd_shared.mapping import POOL_SEALS

LAYOUT = PoolLayout(num_layers=2, num_kv_heads=2, head_dim=8, page_size=16, dtype="float32")


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@given(st.integers(min_value=1, max_value=1 << 45))
def test_few_aligned_chunks_hold_it_all(num_bytes: int) -> None:
    sizes = chunk_sizes(num_bytes)
    assert len(sizes) <= MAX_CHUNKS
    assert all(size % 4096 == 0 for size in sizes)
    assert len(set(sizes[:-1])) <= 1
    assert 0 <= sum(sizes) - num_bytes < 4096


def test_the_memory_is_zeroed_and_really_there() -> None:
    pool = MemfdPool(LAYOUT, 100)
    (fd,) = pool.fds
    stat = os.fstat(fd)
    assert stat.st_size == pool.chunk_bytes[0] >= 100 * LAYOUT.page_bytes == pool.num_bytes
    assert stat.st_blocks * 512 == stat.st_size  # not sparse
    assert not any(os.pread(fd, stat.st_size, 0))
    assert not os.get_inheritable(fd)
    pool.close()


def test_the_size_is_sealed() -> None:
    pool = MemfdPool(LAYOUT, 100)
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(pool.fds[0], size)
    pool.close()


def test_close_is_idempotent_and_leaks_nothing() -> None:
    before = num_fds()
    pool = MemfdPool(LAYOUT, 100)
    assert num_fds() == before + 1
    pool.close()
    pool.close()
    assert num_fds() == before


def test_more_than_the_machine_has_is_refused_with_both_numbers() -> None:
    before = num_fds()
    with pytest.raises(PoolTooLarge, match=r"needs 2048 TiB: .*iB are available"):
        MemfdPool(LAYOUT, (1 << 51) // LAYOUT.page_bytes)
    assert num_fds() == before


def test_running_into_a_limit_gives_back_the_chunks_made_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, allocate = num_fds(), os.posix_fallocate

    def third_fails(fd: int, offset: int, size: int) -> None:
        if num_fds() - before >= 3:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        allocate(fd, offset, size)

    monkeypatch.setattr("kvd.page_pool.MIN_CHUNK_BYTES", 4096)
    monkeypatch.setattr(os, "posix_fallocate", third_fails)
    with pytest.raises(PoolTooLarge, match="Cannot allocate memory; make the pool's size smaller"):
        MemfdPool(LAYOUT, 4096 * 5 // LAYOUT.page_bytes)
    assert num_fds() == before


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemfdPool]:
    """A pool of three chunks, the last a smaller one, with bytes in it."""
    monkeypatch.setattr("kvd.page_pool.MIN_CHUNK_BYTES", 16 * 4096)
    pool = MemfdPool(LAYOUT, 40 * 4096 // LAYOUT.page_bytes)
    assert pool.chunk_bytes == (16 * 4096, 16 * 4096, 8 * 4096)
    for number, fd in enumerate(pool.fds):
        os.pwrite(fd, b"chunk %d" % number, 100)
    yield pool
    pool.close()


def test_memory_that_was_kept_is_adopted_as_it_is(kept: MemfdPool) -> None:
    before = num_fds()
    fds = [os.dup(fd) for fd in kept.fds]
    pool = MemfdPool.adopt(LAYOUT, kept.num_pages, fds)
    assert (pool.fds, pool.chunk_bytes, pool.num_bytes) == (
        tuple(fds), kept.chunk_bytes, kept.num_bytes
    )  # fmt: skip
    assert [os.pread(fd, 7, 100) for fd in pool.fds] == [b"chunk 0", b"chunk 1", b"chunk 2"]
    pool.close()
    assert num_fds() == before


def other_memory(size: int, seals: int = POOL_SEALS, *, sparse: bool = False) -> int:
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    (os.ftruncate if sparse else lambda fd, size: os.posix_fallocate(fd, 0, size))(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)


CHUNK = 16 * 4096
MISFITS: dict[str, tuple[Callable[[list[int]], list[int]], str]] = {
    "none": (lambda fds: [], "0 chunks were kept, the pool has 3"),
    "one missing": (lambda fds: fds[:2], "2 chunks were kept, the pool has 3"),
    "one more": (lambda fds: [*fds, other_memory(4096)], "4 chunks were kept"),
    "another order": (lambda fds: fds[::-1], "chunk 0 has 32768 bytes"),
    "shorter": (lambda fds: [other_memory(4096), *fds[1:]], "chunk 0 has 4096 bytes"),
    "longer": (lambda fds: [*fds[:2], other_memory(CHUNK)], "chunk 2 has 65536 bytes"),
    "not there": (
        lambda fds: [other_memory(CHUNK, sparse=True), *fds[1:]],
        "chunk 0 has 65536 bytes, 0 of them there",
    ),
    "can shrink": (
        lambda fds: [other_memory(CHUNK, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL), *fds[1:]],
        "chunk 0 has seals 0x5",
    ),
    "cannot be written": (
        lambda fds: [other_memory(CHUNK, POOL_SEALS | fcntl.F_SEAL_WRITE), *fds[1:]],
        "chunk 0 has seals 0xf",
    ),
    "read-only": (lambda fds: [read_only(fds[0]), *fds[1:]], "chunk 0 is not open for reading and"),
    "one twice": (lambda fds: [fds[0], fds[0], fds[2]], "chunk 1 is the memory of another chunk"),
    "no memory": (lambda fds: [*fds[:2], os.open("/dev/null", os.O_RDWR)], "chunk 2 is no memfd"),
    "closed": (lambda fds: [*fds[:2], 1_000_000], "chunk 2 is no memfd: Bad file descriptor"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_other_memory_is_not_adopted(kind: str, kept: MemfdPool) -> None:
    swap, message = MISFITS[kind]
    fds = swap(list(kept.fds))
    with pytest.raises(PoolMismatch, match=message):
        MemfdPool.adopt(LAYOUT, kept.num_pages, fds)
    for fd in set(fds) - {*kept.fds, 1_000_000}:
        os.close(fd)  # still the caller's
    assert [os.fstat(fd).st_size for fd in kept.fds] == list(kept.chunk_bytes)


def test_a_cgroup_leaves_its_limit_less_what_is_used_and_not_reclaimable(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 100\ninactive_file 50\n")
    assert available_memory._cgroup_room(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory._cgroup_room(tmp_path) > 1 << 60
    assert available_memory._cgroup_room(tmp_path / "absent") > 1 << 60
