"""`kvd serve`: build the pools, open the sockets, run until told to stop."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from contextlib import suppress

import structlog

from kvd import __version__
from kvd.cache import CacheManager
from kvd.config import KvdConfig, PoolConfig, resolve_pool
from kvd.daemon import Daemon, Pool
from kvd.lease_server import LeaseServer
from kvd.lockfile import DaemonLock
from kvd.page_pool import MemfdPool
from kvd.rpc_server import RpcServer
from kvd_shared.progress import progress_line

DRAIN_POLL_S = 0.05
TICK_S = 0.5

log = structlog.get_logger()


def serve(config: KvdConfig) -> int:
    """Run the daemon until SIGTERM or SIGINT. Returns the exit code."""
    directory = config.daemon.socket_dir
    directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    with DaemonLock(directory):
        pools = [build_pool(pool) for pool in config.pools]
        try:
            return asyncio.run(_run(config, pools))
        finally:
            for pool in pools:
                pool.memory.close()


def build_pool(config: PoolConfig) -> Pool:
    with progress_line(sys.stderr, "digest of the weights") as progress:
        layout, num_pages, model = resolve_pool(config, progress)
    memory = MemfdPool(layout, num_pages)
    log.info("pool.created", pool=config.name, device=config.device, layout=layout.describe(),
             num_pages=num_pages, pool_bytes=memory.num_bytes, model=model)  # fmt: skip
    return Pool(
        config.name, config.device, memory, model, CacheManager(num_pages, layout.page_size)
    )


async def _run(config: KvdConfig, pools: list[Pool]) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    directory = config.daemon.socket_dir
    daemon = Daemon(pools, directory, time.monotonic())
    # What is alive now lives as long as the daemon: collections need not look at it again.
    gc.freeze()
    rpc = RpcServer(daemon, directory, loop)
    leases = LeaseServer(daemon, directory, loop)
    try:
        ticking = loop.create_task(_tick(daemon))
        log.info("daemon.ready", version=__version__, pid=os.getpid(), socket_dir=str(directory))
        await stop.wait()
        await _drain(daemon, stop, config.daemon.drain_timeout_s)
        ticking.cancel()
    finally:
        rpc.close()  # the last answers go out before the news that the daemon is gone
        leases.close()
        log.info("daemon.stopped")
    return 0


async def _tick(daemon: Daemon) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        for pool in daemon.pools.values():
            pool.cache.queue.tick(time.monotonic())


async def _drain(daemon: Daemon, stop: asyncio.Event, timeout_s: float) -> None:
    """Admit nothing new and let what has begun finish; a second signal ends the wait."""
    stop.clear()
    daemon.drain()
    log.info("daemon.draining", requests=daemon.num_requests, timeout_s=timeout_s)
    deadline = time.monotonic() + timeout_s
    while daemon.num_requests and time.monotonic() < deadline and not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), DRAIN_POLL_S)
    if daemon.num_requests:
        log.warning("daemon.drain_cut_short", requests=daemon.num_requests)
