"""The ways to hold the same requests in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.benchmarks.claims.conversations import CONTEXT, MAX_TOKENS
from tests.benchmarks.claims.plan import Ask, Plan

PAGE_SIZE = 16
# 8 whole contexts: what an A100 with 40 GB had left beside a 13B model in the paper that the claims
# are from (Kwon et al., SOSP '23, table 1: 15.7k slots, contexts of 2,048)
NUM_SLOTS = 8 * CONTEXT


@dataclass(frozen=True, slots=True)
class Mode:
    """`reserve`: the slots of one request, taken in one run from its admission to its end; None
    takes pages as tokens come. `share`: requests may use each other's pages."""

    name: str
    share: bool = False
    reserve: Callable[[Ask], int] | None = None
    allocator: Literal["first-fit", "buddy"] = "first-fit"

    def plan(self, asks: Sequence[Ask], salt: str) -> Plan:
        if self.reserve is None:
            return Plan(asks=tuple(asks), salt=salt, alone=not self.share)
        return Plan(
            asks=tuple(asks),
            salt=salt,
            alone=True,
            allocator=self.allocator,
            num_slots=NUM_SLOTS,
            reserve=tuple(self.reserve(ask) for ask in asks),
        )


def longest(ask: Ask) -> int:
    """What the request may grow to, as far as anybody knows when it comes."""
    return min(CONTEXT, len(ask.prompt) + MAX_TOKENS)


def exact(ask: Ask) -> int:
    """What it will grow to: known to no real system."""
    return len(ask.prompt) + ask.num_tokens


WHOLE = Mode("reserve the context", reserve=lambda ask: CONTEXT)
BUDDY = Mode("reserve a power of two", reserve=longest, allocator="buddy")
LONGEST = Mode("reserve prompt + max_tokens", reserve=longest)
EXACT = Mode("reserve, lengths foreseen", reserve=exact)
PAGED = Mode("pages, nothing shared")
SHARED = Mode("pages, as kvd runs", share=True)
MODES = (WHOLE, BUDDY, LONGEST, EXACT, PAGED, SHARED)
