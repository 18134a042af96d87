"""What an admin may ask. Reads change nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np

from kvd import __version__
from kvd.arguments import Arguments
from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.daemon import Daemon, Pool
from kvd_shared.errors import BadRequest, UnknownPool, brief
from kvd_shared.refs import refs_from_bytes
from kvd_shared.wire import PROTOCOL_VERSION

Result = dict[str, Any]
FREE, WRITING, ACTIVE, SHARED, CACHED, DUPLICATE, QUARANTINED = range(7)


def status(daemon: Daemon, args: Arguments, now: float) -> Result:
    args.done()
    return {
        "version": __version__,
        "protocol": PROTOCOL_VERSION,
        "pid": os.getpid(),
        "uptime_s": now - daemon.started_s,
        "draining": daemon.draining,
        "socket_dir": str(daemon.socket_dir),
        "num_sessions": len(daemon.attachments),
        "pools": [_pool(pool) for pool in daemon.pools.values()],
    }


def pages(daemon: Daemon, args: Arguments, now: float) -> Result:
    pool = _named(daemon, args)
    args.done()
    states = page_states(pool.cache)
    return {
        "pool": pool.name,
        "num_pages": pool.cache.num_pages,
        "counts": _counts(states),
        "map": states.tobytes(),
    }


def tree(daemon: Daemon, args: Arguments, now: float) -> Result:
    pool, limit = _named(daemon, args), args.number("max_nodes")
    args.done()
    if limit < 1:
        raise BadRequest(f"tree: max_nodes = {limit} must be at least 1")
    by_namespace: dict[Any, list[Result]] = {}
    count = 0
    for count, node in enumerate(pool.cache.tree.nodes(), start=1):
        if count > limit:
            break
        parent = node.parent
        assert parent is not None
        by_namespace.setdefault(node.namespace, []).append(
            {
                "id": node.id,
                "parent": None if parent.is_root else parent.id,
                "pages": node.num_pages,
                "tokens": node.num_pages * pool.cache.page_size,
                # not the tokens: prompts are private
                "digest": _digest(node.tokens),
                "holders": len(node.holders),
                "last_use_s": None if node.protected else now - node.last_use_s,
            }
        )
    return {
        "pool": pool.name,
        "page_size": pool.cache.page_size,
        "truncated": count > limit,
        "namespaces": [
            {
                "model": space.model,
                "weights_version": space.weights_version,
                "adapter": _digest(space.adapter),
                "salt": _digest(space.salt),
                "nodes": nodes,
            }
            for space, nodes in by_namespace.items()
        ],
    }


def sessions(daemon: Daemon, args: Arguments, now: float) -> Result:
    args.done()
    found = []
    for a in daemon.attachments.values():
        requests = a.pool.cache.queue.of_session(a.session) if a.pool and a.session else []
        found.append(
            {
                "id": a.id,
                "name": a.name,
                "role": a.role,
                "pid": a.pid,
                "uid": a.uid,
                "pool": a.pool.name if a.pool else None,
                "age_s": now - a.attached_s,
                "state": "quarantined" if a.ended else "live",
                "held_pages": a.session.num_held_pages if a.session else 0,
                "writing_pages": len(a.session.writing) if a.session else 0,
                "requests": [{"number": r.number, "running": r.running} for r in requests],
            }
        )
    return {"sessions": found}


def audit(daemon: Daemon, args: Arguments, now: float) -> Result:
    pool = _named(daemon, args)
    args.done()
    try:
        check_cache(pool.cache)
    except AssertionError as e:
        return {"pool": pool.name, "ok": False, "finding": str(e) or "an invariant does not hold"}
    return {"pool": pool.name, "ok": True, "finding": None}


def _digest(private: bytes) -> str:
    """What is shown of prompts and tenants' salts; nothing for nothing."""
    return blake2b(private, digest_size=6).hexdigest() if private else ""


def page_states(cache: CacheManager) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """One state a page: what the page map shows."""
    states = np.zeros(cache.num_pages, dtype=np.uint8)
    for node in cache.tree.nodes():
        live = sum(not session.ended for session in node.holders)
        held = QUARANTINED if node.holders and not live else (CACHED, ACTIVE, SHARED)[min(live, 2)]
        states[refs_from_bytes(node.refs) & 0xFFFF_FFFF] = held
    for session in cache.sessions.values():
        for own, state in ((session.writing, WRITING), (session.sealed, DUPLICATE)):
            mine = np.fromiter(own, dtype=np.int64, count=len(own)) & 0xFFFF_FFFF
            states[mine] = QUARANTINED if session.ended else state
    return states


def _counts(states: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> dict[str, int]:
    n = np.bincount(states, minlength=7).tolist()
    return {
        "free": n[FREE],
        "writing": n[WRITING],
        "active": n[ACTIVE] + n[SHARED],
        "cached": n[CACHED],
        "duplicate": n[DUPLICATE],
        "quarantined": n[QUARANTINED],
    }


def _pool(pool: Pool) -> Result:
    states = page_states(pool.cache)
    running, waiting = pool.cache.queue.counts()
    counters = pool.cache.counters
    return {
        "name": pool.name,
        "device": pool.device,
        "layout": pool.layout.to_wire(),
        "model": pool.model,
        "page_bytes": pool.layout.page_bytes,
        "num_pages": pool.cache.num_pages,
        "counts": _counts(states),
        "shared_pages": int((states == SHARED).sum()),
        "namespaces": pool.cache.tree.num_namespaces,
        "running_requests": running,
        "waiting_requests": waiting,
        "tokens_asked": counters.tokens_asked,
        "tokens_matched": counters.tokens_matched,
        "evicted_pages": counters.evicted_pages,
        "published_pages": counters.published_pages,
        "duplicate_pages": counters.duplicate_pages,
    }


def _named(daemon: Daemon, args: Arguments) -> Pool:
    name = args.optional_string("pool")
    if name is None and len(daemon.pools) == 1:
        return next(iter(daemon.pools.values()))
    if name not in daemon.pools:
        raise UnknownPool(f"no pool {brief(name)}; there are: {', '.join(sorted(daemon.pools))}")
    return daemon.pools[name]


REPORTS: dict[str, Callable[[Daemon, Arguments, float], Result]] = {
    f.__name__: f for f in (status, pages, tree, sessions, audit)
}
