"""What an admin may change: the cache's contents, never what a worker reads or writes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from kvd.arguments import Arguments
from kvd.cache import CacheManager
from kvd.daemon import Daemon
from kvd.report_parts import Result, Sliced, named_pool
from kvd_shared.errors import BadRequest
from kvd_shared.namespace import Namespace

PAGES_A_SLICE = 1000
ROOTS_A_SLICE = 200


def evict(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    """As many as can go of the pages asked for; those that anybody holds cannot."""
    pool, wanted = named_pool(daemon, args), args.number("num_pages")
    args.done()
    if wanted < 1:
        raise BadRequest(f"evict: num_pages = {wanted} must be at least 1")
    cache, gone = pool.cache, 0
    while gone < wanted and cache.tree.num_evictable:
        cache.num_changes += 1
        gone += cache.evict(min(wanted - gone, PAGES_A_SLICE), now)
        yield
    return {"pool": pool.name, "num_pages": gone}


def flush(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    pool = named_pool(daemon, args)
    wanted: dict[str, Any] = {
        "model": args.optional_string("model"),
        "weights_version": args.optional_number("weights_version"),
        "adapter": args.optional_bytes("adapter"),
        "salt": args.optional_bytes("salt"),
    }
    args.done()
    fields = {name: value for name, value in wanted.items() if value is not None}
    count = yield from _flush(
        pool.cache,
        lambda space: all(getattr(space, name) == value for name, value in fields.items()),
        "flushed",
    )
    return {"pool": pool.name, "namespaces": count}


def raise_weights_version(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    """From the first slice on, nothing of an older version is published; at the reply, none of it
    can be matched."""
    pool, model = named_pool(daemon, args), args.optional_string("model")
    version = args.number("version")
    args.done()
    pool.cache.raise_weights_version(model, version)
    count = yield from _flush(pool.cache, pool.cache.versions.is_stale, "stale_version")
    return {"pool": pool.name, "namespaces": count}


def retain_prompt(daemon: Daemon, args: Arguments, now: float) -> Result:
    pool = named_pool(daemon, args)
    cache = pool.cache
    namespace = args.namespace()
    tokens = args.tokens(cache.vocab_size, cache.options.limits.max_prompt_tokens)
    duration_s = args.optional_positive("duration_s")
    args.done()
    cache.num_changes += 1
    number, kept = cache.operator.retain(namespace, tokens, duration_s, now)
    return {"pool": pool.name, "number": number, "tokens": kept}


def release_prompt(daemon: Daemon, args: Arguments, now: float) -> Result:
    pool, number = named_pool(daemon, args), args.number("number")
    args.done()
    pool.cache.num_changes += 1
    pool.cache.operator.release(number, now)
    return {"pool": pool.name}


def _flush(
    cache: CacheManager, wanted: Callable[[Namespace], bool], reason: str
) -> Generator[None, None, int]:
    """Those of the namespaces that are there now; returns how many."""
    roots, count = list(cache.tree.roots.values()), 0
    for start in range(0, len(roots), ROOTS_A_SLICE):
        chosen = [
            root
            for root in roots[start : start + ROOTS_A_SLICE]
            if root.live and wanted(root.namespace)
        ]
        cache.num_changes += 1
        cache.flush(chosen, reason)
        count += len(chosen)
        yield
    return count


def kill_session(daemon: Daemon, args: Arguments, now: float) -> Result:
    session = args.number("session")
    args.done()
    ended = daemon.kill(session, now)
    return {
        "session": ended.id,
        "name": ended.name,
        "pid": ended.process.pid,
        "held_pages": ended.num_held_pages,
    }


CHANGES: dict[str, Callable[[Daemon, Arguments, float], Result | Sliced]] = {
    f.__name__: f
    for f in (
        evict,
        flush,
        raise_weights_version,
        retain_prompt,
        release_prompt,
        kill_session,
    )
}
