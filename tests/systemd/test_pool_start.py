"""Pools at start-up by themselves: one process plays several daemons, one after the other."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvd.config import LayoutConfig, PoolConfig
from kvd.page_pool import MemfdPool, PoolTooLarge
from kvd.pool_start import StartedPool, start_pools
from kvd.survival import NONE, Survival
from kvd_shared.sizes import PoolSize

ONE = PoolConfig(
    name="one",
    layout=LayoutConfig(num_layers=1, num_kv_heads=1, head_dim=8),
    size=PoolSize(64, "pages"),
)
TWO = replace(ONE, name="two", size=PoolSize(32, "pages"))


@pytest.fixture(autouse=True)
def _no_fd_is_left() -> Iterator[None]:
    gc.collect()
    before = open_memories()
    yield
    gc.collect()  # mappings end with what shows them
    assert open_memories() == before


def open_memories() -> set[str]:
    """Inodes of kvd's memory that this process has open or mapped."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and os.readlink(entry).startswith("/memfd:kvd-"):
            found.add(str(entry.stat().st_ino))
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/memfd:kvd-" in line:
            found.add(line.split()[4])
    return found


class Custodian:
    """Keeps duplicates of a daemon's fds, as a manager does."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def keep(self, pools: list[StartedPool]) -> None:
        for each in pools:
            for number, fd in enumerate(each.pool.memory.fds):
                self.kept[f"pool.{each.pool.name}.{number}"] = os.dup(fd)
            self.kept[f"meta.{each.pool.name}"] = os.dup(each.pool.cache.meta.fd)

    def start(self, *configs: PoolConfig) -> list[StartedPool]:
        """The next daemon's pools, with what is kept."""
        received = {name: [os.dup(fd)] for name, fd in self.kept.items()}
        survival = Survival(None, received, kind=NONE)
        try:
            return start_pools(configs, None, survival, time.monotonic())
        finally:
            survival.store.close()

    def close(self) -> None:
        for fd in self.kept.values():
            os.close(fd)
        self.kept.clear()


@pytest.fixture
def custodian() -> Iterator[Custodian]:
    """Of a daemon with two pools, which is gone."""
    custodian = Custodian()
    first = custodian.start(ONE, TWO)
    custodian.keep(first)
    end(first)
    del first  # and its mappings
    yield custodian
    custodian.close()


def end(pools: list[StartedPool]) -> None:
    for each in pools:
        each.pool.cache.meta.header.warm_start_done()
        each.close()


def warm(pools: list[StartedPool]) -> list[bool]:
    return [each.recovery is not None for each in pools]


def test_all_that_fits_is_taken_up(custodian: Custodian) -> None:
    ids = []
    for epoch in (2, 3):
        pools = custodian.start(ONE, TWO)
        assert warm(pools) == [True, True]
        assert [each.pool.cache.meta.header.epoch for each in pools] == [epoch, epoch]
        ids.append([each.pool.pool_id for each in pools])
        end(pools)
    assert ids[0] == ids[1] and len(set(ids[0])) == 2


def test_one_pools_doubt_is_not_the_others(custodian: Custodian) -> None:
    pools = custodian.start(replace(ONE, page_size=32), TWO)
    assert warm(pools) == [False, True]
    end(pools)


@pytest.mark.parametrize("missing", ["pool.one.0", "meta.one"])
def test_half_of_a_pool_is_nothing(missing: str, custodian: Custodian) -> None:
    os.close(custodian.kept.pop(missing))
    pools = custodian.start(ONE, TWO)
    assert warm(pools) == [False, True]
    end(pools)


@pytest.mark.parametrize("missing", range(3))
def test_a_chunk_in_the_middle_is_missed(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.page_pool.MIN_CHUNK_BYTES", 24 << 10)
    custodian = Custodian()
    first = custodian.start(ONE)
    assert len(first[0].pool.memory.fds) == 3
    custodian.keep(first)
    end(first)
    os.close(custodian.kept.pop(f"pool.one.{missing}"))
    pools = custodian.start(ONE)
    assert warm(pools) == [False]
    end(pools)
    custodian.close()


def test_the_memory_of_another_pool_under_its_name_is_not_taken(custodian: Custodian) -> None:
    kept = custodian.kept
    kept["pool.one.0"], kept["pool.two.0"] = kept["pool.two.0"], kept["pool.one.0"]
    pools = custodian.start(ONE, TWO)
    assert warm(pools) == [False, False]
    end(pools)


@pytest.mark.parametrize("offset", [0, 8, 64, 512])
def test_a_header_that_does_not_check_is_not_believed(offset: int, custodian: Custodian) -> None:
    os.pwrite(custodian.kept["meta.one"], b"\xa5" * 8, offset)
    pools = custodian.start(ONE, TWO)
    assert warm(pools)[1] and (offset == 512 or not warm(pools)[0])
    end(pools)


def test_a_warm_start_that_never_succeeds_is_not_tried_for_ever(custodian: Custodian) -> None:
    for _ in range(3):
        pools = custodian.start(ONE)  # and it dies before it is ready
        assert warm(pools) == [True]
        for each in pools:
            each.close()
    pools = custodian.start(ONE)
    assert warm(pools) == [False]
    end(pools)


def test_a_recovery_that_fails_leaves_no_memory(
    custodian: Custodian, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when what it had built refers to itself."""
    from kvd.metadata import ColdStart

    def fail(cache: object, now: float) -> None:
        raise ColdStart("scan", "nothing fits")

    monkeypatch.setattr("kvd.pool_start.recover", fail)
    old = {str(os.fstat(fd).st_ino) for fd in custodian.kept.values()}
    pools = custodian.start(ONE, TWO)
    assert warm(pools) == [False, False]
    custodian.close()
    assert not old & open_memories()
    end(pools)


def test_too_little_memory_leaves_nothing_open(
    custodian: Custodian, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvd.pool_start.FREEING_S", 0.1)
    with pytest.raises(PoolTooLarge):
        custodian.start(ONE, replace(TWO, size=PoolSize(1 << 40, "bytes")))


def test_memory_that_is_freed_a_moment_later_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    until_s = time.monotonic() + 0.3

    class Scarce(MemfdPool):
        def __init__(self, *args: object) -> None:
            if time.monotonic() < until_s:
                raise PoolTooLarge("not yet")
            super().__init__(*args)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr("kvd.pool_start.MemfdPool", Scarce)
    pools = Custodian().start(ONE)
    assert time.monotonic() >= until_s
    end(pools)
