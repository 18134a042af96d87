"""`kvd serve`: build the pools, open the sockets, run until told to stop."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog

from kvd import __version__, resume
from kvd.config import KvdConfig, check_pool
from kvd.daemon import Daemon
from kvd.events.start import start_events
from kvd.lease_server import Fencing, LeaseServer
from kvd.liveness import report, status_line
from kvd.lockfile import DaemonLock
from kvd.pool_start import StartedPool, start_pools
from kvd.rpc_server import RpcServer
from kvd.serving_loop import ServingLoop, ServingSelector
from kvd.socket_files import prepare_socket_dir
from kvd.survival import NONE, Survival
from kvd_shared import compiled
from kvd_shared.digest_cache import DigestCache, default_cache_dir

DRAIN_POLL_S = 0.05
TICK_S = 0.5

log = structlog.get_logger()


def serve(config: KvdConfig) -> int:
    """Run the daemon until SIGTERM or SIGINT. Returns the exit code."""
    survival = Survival.from_environment(os.environ)
    try:
        return _locked(config, survival)
    finally:
        survival.store.close()


def _locked(config: KvdConfig, survival: Survival) -> int:
    for wanted in config.pools:
        check_pool(wanted)  # a bad configuration leaves nothing behind, no lock file either
    directory = config.daemon.socket_dir
    prepare_socket_dir(directory)
    with DaemonLock(directory):
        any_model = any(pool.model for pool in config.pools)
        digests = DigestCache(default_cache_dir(os.environ)) if any_model else None
        pools = start_pools(
            config.pools, digests, survival, time.monotonic(), recorded=survival.kind != NONE
        )
        try:
            selector = ServingSelector()
            with asyncio.Runner(loop_factory=lambda: ServingLoop(selector)) as runner:
                return runner.run(_run(config, pools, survival, selector))
        finally:
            for pool in pools:
                pool.close()


async def _run(
    config: KvdConfig, started: list[StartedPool], survival: Survival, selector: ServingSelector
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    directory = config.daemon.socket_dir
    access = config.access.access(directory)
    pools = [each.pool for each in started]
    daemon = Daemon(pools, directory, time.monotonic(), config.daemon.max_sessions, access)
    resume.reopen(daemon, time.monotonic(), config.daemon.resume_grace_s)
    settle_collector()
    faulthandler.enable()  # a SIGABRT of the watchdog shows where the daemon hung
    rpc = RpcServer(daemon, directory, loop)
    fencing = Fencing(
        death_grace_s=config.daemon.death_grace_s,
        quarantine_alarm_s=config.daemon.quarantine_alarm_s,
    )
    leases = LeaseServer(daemon, directory, loop, fencing)
    selector.serve(rpc.fd, rpc.turn)
    try:
        for pool, pool_config in zip(pools, config.pools, strict=True):
            if pool_config.events is not None:
                events = start_events(pool.cache, pool_config.events, pool.device, loop)
                daemon.publishers[pool.name] = events
                log.info("events.publishing", pool=pool.name, endpoint=events.endpoint)
        tasks = [
            loop.create_task(_tick(daemon, rpc)),
            loop.create_task(report(daemon, survival)),
        ]
        with _keeper_watched(survival, loop):
            survival.ready(status_line(pools))
            for pool in pools:
                pool.cache.meta.header.warm_start_done()
            log.info("daemon.ready", version=__version__, core=compiled.state(), pid=os.getpid(),
                     socket_dir=str(directory), survival=survival.kind)  # fmt: skip
            await stop.wait()
            survival.stopping()
            await _drain(daemon, stop, config.daemon.drain_timeout_s)
        for task in tasks:
            task.cancel()
    finally:
        for publisher in daemon.publishers.values():
            publisher.close()
        selector.stop_serving()
        rpc.close()  # the last answers go out before the news that the daemon is gone
        leases.close()
        log.info("daemon.stopped")
    return 0


@contextmanager
def _keeper_watched(survival: Survival, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """The end of the keeper is noticed at once; the daemon goes on."""
    pidfd = survival.watch_keeper()
    if pidfd is None:
        yield
        return

    def gone() -> None:
        loop.remove_reader(pidfd)
        survival.gone("the keeper has ended")

    loop.add_reader(pidfd, gone)
    try:
        yield
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def settle_collector() -> None:
    """What is alive now, and every node of the tree later, lives long and is freed by its count of
    references: only the youngest objects are looked at for cycles. A look at all of a large tree
    would take tens of milliseconds."""
    gc.freeze()
    gc.set_threshold(5_000, 1_000_000, 1_000_000)


async def _tick(daemon: Daemon, rpc: RpcServer) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        resume.tick(daemon, time.monotonic())
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
