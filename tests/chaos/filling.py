"""A pool that has cached a whole universe before anything happens to it."""

from __future__ import annotations

import numpy as np

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.refs import page_ids
from tests.chaos.content import LANES, PAGE_SIZE, Universe


def fill(client: KvdClient, universe: Universe) -> int:
    """Compute and publish the full pages of every stem; returns how many pages that were."""
    assert client.mapping is not None
    write = np.frombuffer(client.mapping.write_view(), "<u8").reshape(-1, PAGE_SIZE, LANES)
    num_pages = 0
    for path in universe.paths():
        namespace, tokens = universe.namespace(path), universe.tokens(path)
        pages = len(tokens) // PAGE_SIZE
        # one token more than these pages have, so that all of them may match
        found = client.call(verbs.acquire(namespace, [*tokens[: pages * PAGE_SIZE], 0], pages))
        first = found.num_matched_pages
        own = found.refs[first:]
        if len(own):
            span = slice(first * PAGE_SIZE, pages * PAGE_SIZE)
            write[page_ids(own)] = universe.words(path)[span].reshape(-1, PAGE_SIZE, LANES)
            after = int(found.refs[first - 1]) if first else None
            client.call(verbs.publish(namespace, tokens[span], own, after))
            num_pages += len(own)
        client.call(verbs.free(found.refs))
    return num_pages
