"""Replays a trace through the cache core, one request after the other, as one worker would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import thread_time_ns

import numpy as np

from kvd.cache import CacheManager
from kvd.options import CacheOptions
from kvd.policies.recompute_cost import TWICE_AT
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES
from tests.benchmarks.trace.request import Trace

BLOCK_TOKENS = 512
NAMESPACE = Namespace(model="trace")
ONE_MORE = bytes(4)  # a match never finds a prompt's last token: so all of its blocks can be found


@dataclass(frozen=True, slots=True)
class Replayed:
    found: int  # blocks
    asked: int  # blocks of all prompts, also of those that the pool cannot hold
    left_out: int  # prompts of more blocks than the pool has pages; they are not sent
    saved: float  # of the work of computing all prompts, as recompute_cost has it
    cpu_s: float  # in the cache core

    @property
    def share(self) -> float:
        return self.found / self.asked


def replay(
    trace: Trace,
    policy: str,
    num_pages: int,
    page_size: int = BLOCK_TOKENS,
    tell: Callable[[int], None] = lambda done: None,
) -> Replayed:
    """Each block is one page, outputs occupy nothing, and the clock is the trace's."""
    cache = CacheManager(num_pages, page_size, CacheOptions(policy=policy))
    session = cache.open_session(1, "trace", trace[0].at_s)
    found = asked = left_out = cpu_ns = 0
    saved = work = 0.0
    page = page_size * 4
    for number, request in enumerate(trace):
        tell(number)
        count, now = len(request.blocks), request.at_s
        asked += count
        work += _work(count, page_size)
        if count > num_pages:
            left_out += 1
            continue
        tokens = np.repeat(np.array(request.blocks, dtype="<i4"), page_size).tobytes()
        start = thread_time_ns()
        held = cache.acquire(session, NAMESPACE, tokens + ONE_MORE, count, None, now)
        known = held.num_matched_pages
        if known < count:
            last = held.refs[(known - 1) * REF_BYTES : known * REF_BYTES] if known else b""
            after = int.from_bytes(last, "little") if known else None
            new = held.refs[known * REF_BYTES :]
            cache.publish(session, NAMESPACE, tokens[known * page :], new, after, now)
        cache.free(session, held.refs, now)
        cpu_ns += thread_time_ns() - start
        found += known
        saved += _work(known, page_size)
    return Replayed(found, asked, left_out, saved / work, cpu_ns / 1e9)


def _work(count: int, page_size: int) -> float:
    """Of computing a prompt's first pages, in those of a page of which nothing comes before."""
    return count * (1 + count * page_size / 2 / TWICE_AT)
