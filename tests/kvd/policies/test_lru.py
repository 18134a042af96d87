"""Exact LRU on the real tree, against a plain list of pages."""

from __future__ import annotations

import random

import pytest

from tests.kvd.policies.asker import Asker
from tests.kvd.policies.test_hit_density import conversations

POOL = 120


@pytest.mark.parametrize("seed", range(6))
def test_finds_what_a_list_in_order_of_use_finds(seed: int) -> None:
    """The list is told apart by a page's whole path; of one prompt the end is the older."""
    asker = Asker("lru", POOL)
    used: list[tuple[int, ...]] = []  # longest unused first
    for prompt in conversations(random.Random(seed), 400):
        paths = [tuple(prompt[: i + 1]) for i in range(len(prompt))]
        found = 0
        while found < len(paths) and paths[found] in used:
            found += 1
        assert asker.ask(prompt) == found
        used = [path for path in used if path not in paths] + paths[::-1]
        del used[: max(len(used) - POOL, 0)]
