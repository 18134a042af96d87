"""What the manager hears of a daemon that is sound, and of one that is not."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import numpy as np

from kvd.cache import CacheManager
from kvd.daemon import Daemon, Pool
from kvd.liveness import report, status_line, wrong_counts
from kvd.page_pool import MemfdPool
from kvd.survival import Survival
from kvd_shared.layout import PoolLayout
from kvd_shared.namespace import Namespace

LAYOUT = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=8, page_size=16, dtype="float32")


def used_cache() -> CacheManager:
    """With pages of every kind."""
    cache = CacheManager(16, 16)
    session = cache.open_session(1, "worker", 0.0)
    held = cache.allocate(session, 4, None, 0.0)
    tokens = np.arange(32, dtype=np.int32).tobytes()
    cache.publish(session, Namespace(model="m"), tokens, held[:16], None, 0.0)
    cache.seal_tail(session, int.from_bytes(held[16:24], "little"), 3)
    cache.lease(session, 2, None, 0.0)
    return cache


def test_all_pages_are_counted_wherever_they_are() -> None:
    cache = used_cache()
    assert wrong_counts(cache) is None
    (session,) = cache.sessions.values()
    cache.end_session(session)
    assert wrong_counts(cache) is None
    cache.release_session(session)
    while cache.sweep(1.0):
        assert wrong_counts(cache) is None


def test_a_lost_page_and_one_that_is_in_two_places_are_noticed() -> None:
    lost, twice = used_cache(), used_cache()
    lost.free_list.take(1)
    assert wrong_counts(lost) == "9 free + 2 in the tree + 4 private != 16 pages"
    twice.free_list.put(lost.free_list.take(1).tobytes())
    assert wrong_counts(twice) == "11 free + 2 in the tree + 4 private != 16 pages"


async def test_a_broken_daemon_asks_to_be_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000"}
        survival = Survival.from_environment(env)
        pool = Pool("p", "cpu", MemfdPool(LAYOUT, 16), None, used_cache())
        daemon = Daemon([pool], tmp_path, 0.0)
        reporting = asyncio.create_task(report(daemon, survival))
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert await asyncio.wait_for(loop.sock_recv(manager, 99), 5) == b"WATCHDOG=1"
        pool.cache.free_list.take(1)
        await asyncio.wait_for(reporting, 5)
        said = b""
        while said in (b"", b"WATCHDOG=1"):
            said = await asyncio.wait_for(loop.sock_recv(manager, 99), 5)
        assert said == b"WATCHDOG=trigger"
        assert status_line([pool]) == "p: 9 of 16 pages free, 1 sessions"
        pool.memory.close()
