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
from kvd.config import KvdConfig, PoolConfig, check_pool, resolve_pool
from kvd.daemon import Daemon, Pool
from kvd.events.start import start_events
from kvd.lease_server import LeaseServer
from kvd.lockfile import DaemonLock
from kvd.page_pool import MemfdPool
from kvd.rpc_server import RpcServer
from kvd.serving_loop import ServingLoop, ServingSelector
from kvd_shared import compiled
from kvd_shared.digest_cache import DigestCache, default_cache_dir
from kvd_shared.progress import progress_line

DRAIN_POLL_S = 0.05
TICK_S = 0.5

log = structlog.get_logger()


def serve(config: KvdConfig) -> int:
    """Run the daemon until SIGTERM or SIGINT. Returns the exit code."""
    for wanted in config.pools:
        check_pool(wanted)  # a bad configuration leaves nothing behind, no lock file either
    directory = config.daemon.socket_dir
    directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    with DaemonLock(directory):
        any_model = any(pool.model for pool in config.pools)
        digests = DigestCache(default_cache_dir(os.environ)) if any_model else None
        pools = [build_pool(pool, digests) for pool in config.pools]
        try:
            selector = ServingSelector()
            with asyncio.Runner(loop_factory=lambda: ServingLoop(selector)) as runner:
                return runner.run(_run(config, pools, selector))
        finally:
            for pool in pools:
                pool.memory.close()


def build_pool(config: PoolConfig, digests: DigestCache | None = None) -> Pool:
    with progress_line(sys.stderr, "digest of the weights") as progress:
        layout, num_pages, model, vocab_size = resolve_pool(config, progress, digests)
    memory = MemfdPool(layout, num_pages)
    log.info("pool.created", pool=config.name, device=config.device, layout=layout.describe(),
             num_pages=num_pages, pool_bytes=memory.num_bytes, model=model)  # fmt: skip
    cache = CacheManager(num_pages, layout.page_size, config.cache)
    if vocab_size is not None:
        cache.vocab_size = vocab_size
    return Pool(config.name, config.device, memory, model, cache)


async def _run(config: KvdConfig, pools: list[Pool], selector: ServingSelector) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    directory = config.daemon.socket_dir
    daemon = Daemon(pools, directory, time.monotonic(), config.daemon.max_sessions)
    settle_collector()
    rpc = RpcServer(daemon, directory, loop)
    leases = LeaseServer(daemon, directory, loop)
    selector.serve(rpc.fd, rpc.turn)
    try:
        for pool, pool_config in zip(pools, config.pools, strict=True):
            if pool_config.events is not None:
                events = start_events(pool.cache, pool_config.events, pool.device, loop)
                daemon.publishers[pool.name] = events
                log.info("events.publishing", pool=pool.name, endpoint=events.endpoint)
        ticking = loop.create_task(_tick(daemon, rpc))
        log.info("daemon.ready", version=__version__, core=compiled.state(), pid=os.getpid(),
                 socket_dir=str(directory))  # fmt: skip
        await stop.wait()
        await _drain(daemon, stop, config.daemon.drain_timeout_s)
        ticking.cancel()
    finally:
        for publisher in daemon.publishers.values():
            publisher.close()
        selector.stop_serving()
        rpc.close()  # the last answers go out before the news that the daemon is gone
        leases.close()
        log.info("daemon.stopped")
    return 0


def settle_collector() -> None:
    """What is alive now, and every node of the tree later, lives long and is freed by its count of
    references: only the youngest objects are looked at for cycles. A look at all of a large tree
    would take tens of milliseconds."""
    gc.freeze()
    gc.set_threshold(5_000, 1_000_000, 1_000_000)


async def _tick(daemon: Daemon, rpc: RpcServer) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        for pool in daemon.pools.values():
            pool.cache.tick(time.monotonic())
        rpc.pass_on_notices()
        daemon.wake()


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
