"""Whether two runs gave the same answers."""

from __future__ import annotations

from collections.abc import Sequence

from modelworker.cli import SHIPPED_MODEL
from tests.benchmarks.claims.plan import Ask


def unexplained(asks: Sequence[Ask], one: list[list[int]], other: list[list[int]]) -> int:
    """How many answers differ. Where they part at a token that the plain dense path, computed by
    itself, finds all but equal to the second best, rounding decided, and it does not count."""
    different = [i for i, answer in enumerate(one) if answer != other[i]]
    if not different:
        return 0
    from tests.integration.tiny_world import NEAR_TIE, Oracle

    oracle = Oracle(SHIPPED_MODEL)
    count = 0
    for i in different:
        pairs = zip(one[i], other[i], strict=True)
        at = next(n for n, (a, b) in enumerate(pairs) if a != b)
        expected = oracle.expected(asks[i].prompt, at + 1)
        agreed = list(expected.tokens[:at]) == one[i][:at]
        count += not agreed or expected.margins[at] >= NEAR_TIE
    return count
