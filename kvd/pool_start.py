"""The pools at start-up: warm, in the memory that outlived the last daemon, or cold, in new memory.

On any doubt cold: all of the pool's old memory is given up before the new one is allocated, since
the machine may not have room for both.
"""

from __future__ import annotations

import gc
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import structlog

from kvd.cache import CacheManager
from kvd.config import PoolConfig, ResolvedPool, resolve_pool
from kvd.daemon import Pool
from kvd.metadata import ColdStart, Geometry, Metadata, create_metadata, open_metadata
from kvd.page_pool import MAX_CHUNKS, MemfdPool, PoolMismatch, PoolTooLarge
from kvd.recovery import Recovery, recover
from kvd.survival import Survival
from kvd_shared.digest_cache import DigestCache
from kvd_shared.progress import progress_line

FREEING_S = 2.0  # a manager may close fds a little after it said so
RETRY_S = 0.05

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedPool:
    """A pool, and what a warm one has to settle with its old sessions."""

    pool: Pool
    recovery: Recovery | None  # None: a cold start

    def close(self) -> None:
        """Drops this process's fds; the manager's stay. Idempotent."""
        self.pool.memory.close()
        self.pool.cache.meta.close()


def start_pools(
    configs: Sequence[PoolConfig],
    digests: DigestCache | None,
    survival: Survival,
    now: float,
    *,
    recorded: bool = True,
) -> list[StartedPool]:
    """All of them, in order, their memory in the manager's keeping if there is one. `recorded`: new
    ones are to come back warm after a restart.

    Raises what `resolve_pool` can raise, before anything is given up, or PoolTooLarge.
    """
    resolved = [_resolve(config, digests) for config in configs]
    names = {name for config in configs for name in _fd_names(config.name)}
    survival.forget(sorted(set(survival.store.names()) - names))  # of pools that are no more
    started: list[StartedPool | None] = []
    try:
        for config, wanted in zip(configs, resolved, strict=True):
            started.append(_warm(config, wanted, survival, now))
        for number, (config, wanted) in enumerate(zip(configs, resolved, strict=True)):
            if started[number] is None:
                started[number] = _cold(config, wanted, recorded=recorded)
    except BaseException:
        for each in started:
            if each is not None:
                each.close()
        raise
    pools = [each for each in started if each is not None]
    _keep(pools, survival)
    return pools


def _resolve(config: PoolConfig, digests: DigestCache | None) -> ResolvedPool:
    with progress_line(sys.stderr, "digest of the weights") as progress:
        return resolve_pool(config, progress, digests)


def _close_all(fds: dict[str, int]) -> None:
    for fd in fds.values():
        os.close(fd)


def _warm(
    config: PoolConfig, wanted: ResolvedPool, survival: Survival, now: float
) -> StartedPool | None:
    """None: nothing was kept, or it does not fit; then nothing of it is left."""
    names = list(_fd_names(config.name))
    kept = [name for name in names if name in survival.store.names()]
    if not kept:
        return None
    fds = {name: fd for name in kept if (fd := survival.store.take(name)) is not None}
    try:
        return _adopt(config, wanted, fds, now)
    except (ColdStart, PoolMismatch) as e:
        log.warning("pool.cold", pool=config.name, why=str(e),
                    effect="its cache is lost; workers attach anew")  # fmt: skip
    _close_all(fds)
    gc.collect()  # what was built on the metadata maps it, and refers to itself
    survival.forget(kept)
    return None


def _adopt(
    config: PoolConfig, wanted: ResolvedPool, fds: dict[str, int], now: float
) -> StartedPool:
    """Takes out of `fds` what is owned by the result, or was closed."""
    layout, num_pages, model, _ = wanted
    meta_name, *chunk_names = _fd_names(config.name)
    chunks = chunk_names[: len(fds) - 1]
    if set(chunks) | {meta_name} != fds.keys():
        raise PoolMismatch(f"not all of its memory was kept, but {', '.join(fds)}")
    memory = MemfdPool.adopt(layout, num_pages, [fds[name] for name in chunks])
    meta = open_metadata(fds[meta_name], _geometry(wanted))
    try:
        cache = _cache(config, wanted, meta)
        recovery = recover(cache, now)
    except BaseException:
        del fds[meta_name]
        meta.close()
        raise
    fds.clear()
    log.info("pool.warm", pool=config.name, num_pages=num_pages, model=model,
             pool_id=meta.header.pool_id, epoch=meta.header.epoch,
             **asdict(recovery.report))  # fmt: skip
    return _started(config, wanted, memory, cache, recovery)


def _cold(config: PoolConfig, wanted: ResolvedPool, *, recorded: bool) -> StartedPool:
    layout, num_pages, model, _ = wanted
    memory = _allocate(wanted)
    try:
        meta = create_metadata(_geometry(wanted, recorded=recorded), secrets.token_hex(8))
    except BaseException:
        memory.close()
        raise
    log.info("pool.created", pool=config.name, device=config.device, layout=layout.describe(),
             num_pages=num_pages, pool_bytes=memory.num_bytes, model=model,
             pool_id=meta.header.pool_id)  # fmt: skip
    return _started(config, wanted, memory, _cache(config, wanted, meta), None)


def _allocate(wanted: ResolvedPool) -> MemfdPool:
    """Waits a little for memory that was given up a moment ago."""
    give_up_s = time.monotonic() + FREEING_S
    while True:
        try:
            return MemfdPool(wanted.layout, wanted.num_pages)
        except PoolTooLarge:
            if time.monotonic() > give_up_s:
                raise
            time.sleep(RETRY_S)


def _geometry(wanted: ResolvedPool, *, recorded: bool = True) -> Geometry:
    layout = wanted.layout
    return Geometry(
        num_pages=wanted.num_pages,
        recorded=recorded,
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
        layout=repr(sorted(layout.to_wire().items())).encode(),
        model=(wanted.model_fingerprint or "").encode(),
    )


def _cache(config: PoolConfig, wanted: ResolvedPool, meta: Metadata) -> CacheManager:
    cache = CacheManager(wanted.num_pages, wanted.layout.page_size, config.cache, meta)
    if wanted.vocab_size is not None:
        cache.vocab_size = wanted.vocab_size
    return cache


def _started(
    config: PoolConfig,
    wanted: ResolvedPool,
    memory: MemfdPool,
    cache: CacheManager,
    recovery: Recovery | None,
) -> StartedPool:
    pool = Pool(
        config.name,
        config.device,
        memory,
        wanted.model_fingerprint,
        cache,
        cache.meta.header.pool_id,
        recovery,
    )
    return StartedPool(pool=pool, recovery=recovery)


def _keep(pools: Sequence[StartedPool], survival: Survival) -> None:
    """Hands over what is new. The metadata goes last: where it is, all of the memory is."""
    new: dict[str, int] = {}
    for each in pools:
        if each.recovery is None:
            meta_name, *chunk_names = _fd_names(each.pool.name)
            new |= dict(zip(chunk_names, each.pool.memory.fds, strict=False))
            new[meta_name] = each.pool.cache.meta.fd

    def tell() -> None:
        for each in pools:
            each.pool.memory.survival = survival.kind

    survival.on_lost = tell
    survival.keep(new, total=sum(len(each.pool.memory.fds) + 1 for each in pools))
    tell()


def _fd_names(pool: str) -> Iterator[str]:
    """The metadata's, then every chunk's that there can be. Names of pools have no ':'."""
    yield f"meta.{pool}"
    yield from (f"pool.{pool}.{chunk}" for chunk in range(MAX_CHUNKS))
