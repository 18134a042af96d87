"""One pool's events from now on: a new epoch, with what is cached already at its beginning."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable

from kvd.cache import CacheManager
from kvd.events.log import EventLog
from kvd.events.options import EventsOptions
from kvd.events.publisher import Publisher
from kvd.node import Node


def start_events(
    cache: CacheManager, options: EventsOptions, device: str, loop: asyncio.AbstractEventLoop
) -> Publisher:
    """Watch the cache and publish; the caller closes the publisher. O(cached pages), so before the
    first request. Raises OSError when an endpoint cannot be bound."""
    medium = "CPU" if device == "cpu" else "GPU"
    events = new_log(cache.num_pages, cache.page_size, options, medium, time.time())
    announce(events, cache.tree.nodes())
    publisher = Publisher(events, options, loop)
    cache.tree.observer = events
    return publisher


def new_log(
    num_pages: int, page_size: int, options: EventsOptions, medium: str, now: float
) -> EventLog:
    """`now`: seconds since 1970."""
    return EventLog(
        num_pages,
        page_size,
        epoch=secrets.token_bytes(16),
        # A microsecond a batch: no epoch before this one has come so far. So its subscribers see a
        # gap, ask for what is behind it, and get this epoch's AllBlocksCleared first.
        first_seq=int(now * 1e6),
        medium=medium,
        buffer_steps=options.buffer_steps,
    )


def announce(events: EventLog, nodes: Iterable[Node]) -> None:
    """Tell of all pages that can be matched, as if they were published now."""
    for node in sorted(nodes, key=lambda node: node.depth):  # what they continue comes first
        if node.root.live and node.parent is not None:
            tokens, refs = bytes(node.tokens), bytes(node.refs)
            events.stored(node.namespace, node.parent.last_ref, tokens, refs)
