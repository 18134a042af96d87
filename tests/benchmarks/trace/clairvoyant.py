"""What could be found if the future were known: Belady's MIN on the same trace.

It keeps the blocks whose next uses are nearest, and may give up any at once, also those of the
prompt just served (it can hold no more than `num_blocks` between two requests). A block is used
whenever one behind it is, so its next use is never later than theirs; among equals the deepest
goes first. So a parent never goes before its child, and what is kept are always prefixes: the
constraint of the tree costs nothing, and no policy finds more.
"""

from __future__ import annotations

import heapq

from tests.benchmarks.trace.request import Trace

NEVER = 1 << 60


def clairvoyant(trace: Trace, num_blocks: int) -> int:
    """Blocks found. A prompt of more than `num_blocks` finds nothing and changes nothing."""
    trace = [request for request in trace if len(request.blocks) <= num_blocks]
    kept: dict[int, int] = {}  # block: its next use
    latest: list[tuple[int, int, int]] = []  # -next use, -depth, block; some are out of date
    found = 0
    for request, uses in zip(trace, _next_uses(trace), strict=True):
        found += sum(block in kept for block in request.blocks)
        for depth, (block, use) in enumerate(zip(request.blocks, uses, strict=True)):
            kept[block] = use
            heapq.heappush(latest, (-use, -depth, block))
        while len(kept) > num_blocks:
            use, _, block = heapq.heappop(latest)
            if kept.get(block) == -use:
                del kept[block]
    return found


def _next_uses(trace: Trace) -> list[list[int]]:
    """For each request and block: the number of the next request that has it."""
    coming: dict[int, int] = {}
    result = []
    for number in range(len(trace) - 1, -1, -1):
        blocks = trace[number].blocks
        result.append([coming.get(block, NEVER) for block in blocks])
        coming.update(dict.fromkeys(blocks, number))
    return result[::-1]
