"""What the service manager hears while the daemon runs: that it is alive and sound, and how it is.

The loop itself says it, so a loop that hangs is silent; and only a daemon whose counts add up says
it: one that has lost a page would hand out somebody else's sooner or later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from kvd.cache import CacheManager
from kvd.daemon import Daemon, Pool
from kvd.survival import Survival

LONGEST_S = 5.0  # between two signs of life
STATUS_S = 5.0

log = structlog.get_logger()


async def report(daemon: Daemon, survival: Survival) -> None:
    """For ever. A broken daemon ends here: the manager is asked to kill it and to start a new one,
    which trusts no more than the records."""
    loop = asyncio.get_running_loop()
    told, told_s = "", loop.time()
    while True:
        await asyncio.sleep(min(LONGEST_S, (survival.watchdog_s or LONGEST_S * 3) / 3))
        pools = list(daemon.pools.values())
        broken = [why for pool in pools if (why := wrong_counts(pool.cache))]
        if broken:
            log.error("daemon.broken", why=broken, effect="it asks to be killed and started anew")
            survival.broken()
            return
        survival.alive()
        text = status_line(pools)
        if text != told and loop.time() - told_s >= STATUS_S:
            survival.status(text)
            told, told_s = text, loop.time()


def wrong_counts(cache: CacheManager) -> str | None:
    """The cheap part of the audit, O(sessions): what is wrong, or None."""
    free, in_tree, total = len(cache.free_list), cache.tree.num_pages, cache.num_pages
    private = sum(len(s.writing) + len(s.leased) for s in cache.sessions.values())
    private += len(cache.sealed)
    if free + in_tree + private == total:
        return None
    return f"{free} free + {in_tree} in the tree + {private} private != {total} pages"


def status_line(pools: Sequence[Pool]) -> str:
    """`llama: 1,024 of 4,096 pages free, 3 sessions`"""
    return "; ".join(
        f"{pool.name}: {len(pool.cache.free_list):,} of {pool.cache.num_pages:,} pages free, "
        f"{sum(number > 0 for number in pool.cache.sessions):,} sessions"
        for pool in pools
    )
