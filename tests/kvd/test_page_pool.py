import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd import available_memory
from kvd.page_pool import MAX_CHUNKS, MemfdPool, PoolTooLarge, chunk_sizes
from kvd_shared.layout import PoolLayout

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


def test_a_cgroup_leaves_its_limit_less_what_is_used_and_not_reclaimable(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 100\ninactive_file 50\n")
    assert available_memory._cgroup_room(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory._cgroup_room(tmp_path) > 1 << 60
    assert available_memory._cgroup_room(tmp_path / "absent") > 1 << 60
