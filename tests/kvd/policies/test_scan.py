"""A scan: prompts that come once must not drive out those that come again and again."""

from __future__ import annotations

import pytest

from tests.kvd.policies.asker import Asker

POOL = 200  # pages
HOT = [[1000 + 10 * i + j for j in range(5)] for i in range(10)]  # a quarter of the pool


def hot_pages_after_a_scan(policy: str) -> int:
    asker = Asker(policy, POOL)
    for _ in range(5):
        for prompt in HOT:
            asker.ask(prompt)
    for first in range(10_000, 10_000 + 4 * POOL, 5):
        asker.ask(range(first, first + 5))
    return sum(asker.cached(prompt) for prompt in HOT)


@pytest.mark.parametrize("policy", ["density", "cost"])
def test_what_is_used_often_outlives_a_scan_of_four_pools(policy: str) -> None:
    assert hot_pages_after_a_scan(policy) == 50


def test_not_so_with_lru() -> None:
    assert hot_pages_after_a_scan("lru") == 0


@pytest.mark.parametrize("policy", ["density", "cost"])
def test_what_was_hot_goes_when_other_prompts_are(policy: str) -> None:
    """Resistance must end: new prompts that do come again take the place of the old ones."""
    asker = Asker(policy, POOL)
    for _ in range(20):
        for prompt in HOT:
            asker.ask(prompt)
    new = [[5000 + 10 * i + j for j in range(5)] for i in range(40)]  # the whole pool
    for _ in range(20):
        for prompt in new:
            asker.ask(prompt)
    assert sum(asker.cached(prompt) for prompt in new) >= 180
