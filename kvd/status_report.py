"""The daemon and its pools in numbers."""

from __future__ import annotations

import os
from collections.abc import Generator

from kvd import __version__
from kvd.arguments import Arguments
from kvd.cache import CacheManager
from kvd.daemon import Daemon, Pool
from kvd.page_map import page_counts
from kvd.report_parts import Result, Sliced
from kvd_shared import compiled
from kvd_shared.wire import PROTOCOL_VERSION

SEQUENCES_A_SLICE = 1000


def status(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    args.done()
    pools = []
    for pool in list(daemon.pools.values()):
        pools.append((yield from _pool(pool)))
    return {
        "version": __version__,
        "protocol": PROTOCOL_VERSION,
        "core": compiled.state(),
        "pid": os.getpid(),
        "uptime_s": now - daemon.started_s,
        "draining": daemon.draining,
        "socket_dir": str(daemon.socket_dir),
        "num_sessions": len(daemon.attachments),
        "quarantined_sessions": sum(one.ended for one in daemon.attachments.values()),
        "quarantine_alarms": daemon.quarantine_alarms,
        "refused": dict(daemon.refused),
        "refused_access": dict(daemon.refusals.counts),
        "ignored_connections": daemon.breaches.num_ignored,
        "ignored_messages": daemon.breaches.num_dropped,
        "pools": pools,
    }


def _pool(pool: Pool) -> Generator[None, None, Result]:
    cache = pool.cache
    slots, wasted = yield from _sequence_slots(cache)
    counts = yield from page_counts(cache)
    running, waiting = cache.queue.counts()
    tree, counters, departures = cache.tree, cache.counters, cache.tree.departures
    return {
        "name": pool.name,
        "device": pool.device,
        "layout": pool.layout.to_wire(),
        "model": pool.model,
        "survival": pool.memory.survival,
        "page_bytes": pool.layout.page_bytes,
        "num_pages": cache.num_pages,
        "counts": counts,
        "shared_pages": tree.num_shared,
        "detached_pages": tree.num_detached,
        "retained_pages": cache.operator.num_pages,
        "retain_quota": cache.operator.quota,
        # pages that would be needed without sharing, over those that are
        "sharing_factor": tree.num_holds / tree.num_held if tree.num_held else None,
        "sequences": sum(len(s.sequences) for s in cache.sessions.values()),
        "sequence_slots": slots,
        "wasted_slots": wasted,
        "namespaces": tree.num_namespaces,
        "running_requests": running,
        "waiting_requests": waiting,
        "announced_requests": len(cache.announcements),
        "requests_waited": cache.announcements.waited,
        "tokens_asked": counters.tokens_asked,
        "tokens_matched": counters.tokens_matched,
        "tokens_matched_own": counters.tokens_matched_own,
        "tokens_partial": counters.tokens_partial,
        "published_pages": counters.published_pages,
        "duplicate_pages": counters.duplicate_pages,
        "copied_pages": counters.copied_pages,
        "allocated_pages": counters.allocated_pages,
        "left_pages": dict(departures.pages),
        "lifetime_s": departures.lifetime.to_wire(),
        "idle_s": departures.idle.to_wire(),
        "policy": cache.options.policy,
        "tenants": [
            {
                "name": tenant.name,
                "num_pages": tenant.num_pages,
                "min_pages": tenant.min_pages,
                "max_pages": tenant.max_pages,
            }
            for tenant in tree.eviction.tenants
        ],
    }


def _sequence_slots(cache: CacheManager) -> Generator[None, None, tuple[int, int]]:
    """Slots of the open sequences' pages, and those of them that no token has."""
    slots = wasted = 0
    for session in list(cache.sessions.values()):
        sequences = list(session.sequences.values())
        for start in range(0, len(sequences), SEQUENCES_A_SLICE):
            for one in sequences[start : start + SEQUENCES_A_SLICE]:
                slots += len(one.refs) * cache.page_size
                wasted += one.num_unused_slots(cache.page_size)
            yield
    return slots, wasted
