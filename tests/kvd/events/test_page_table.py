"""The page table against a plain dictionary."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvd.events.page_table import NONE, Cursor, Origin, PageTable
from kvd_shared.refs import GENERATION

ORIGIN = Origin(seed=1, lora_name=None, cache_salt=None)
PAGES = 40


def add(table: PageTable, ref: int, digest: int) -> None:
    tokens = np.full((1, 4), digest, np.int32)
    table.add(np.array([ref]), [digest], NONE, ORIGIN, tokens)


@pytest.mark.parametrize("seed", range(20))
def test_random_changes_with_walks_under_way(seed: int) -> None:
    """A walk sees, once and in order, what was there when it began and still is when it gets
    there; and nothing that came later."""
    dice = random.Random(seed)
    table, model, generation = PageTable(PAGES, 4), dict[int, int](), 0
    walks: list[tuple[Cursor, list[int], list[int]]] = []  # with refs at its start, and seen
    for turn in range(300):
        free = [page for page in range(PAGES) if page not in {r & 0xFFFF for r in model}]
        if free and dice.random() < 0.5:
            generation += 1
            ref = generation * GENERATION + dice.choice(free)
            model[ref] = dice.randrange(8) + 8 * turn  # few buckets, no hash twice
            add(table, ref, model[ref])
        elif model:
            ref = dice.choice(list(model))
            assert table.remove(ref) == model.pop(ref)
            assert table.remove(ref) == NONE
        if dice.random() < 0.1 and len(walks) < 3:
            walks.append((table.walk(), list(model), []))
        for walk in list(walks):
            cursor, at_start, seen = walk
            taken = table.take(cursor, dice.randrange(1, 4))
            seen += [table.ref[page] for page in taken]
            assert all(ref in model for ref in seen[-len(taken) :] if taken)
            if not taken:
                assert set(seen) <= set(at_start)
                assert seen == [ref for ref in at_start if ref in set(seen)], "out of order"
                assert set(at_start) & set(model) <= set(seen), "missed one that stayed"
                table.leave(cursor)
                walks.remove(walk)
        table.check()
        assert table.num_pages == len(model)
        for ref, digest in model.items():
            page = table.page_with(digest)
            assert table.ref[page] == ref and table.tokens[page].tolist() == [digest] * 4


def test_a_page_is_announced_once() -> None:
    table = PageTable(4, 4)
    add(table, 2, 7)
    with pytest.raises(AssertionError, match="page 2 is announced twice"):
        add(table, 2 + GENERATION, 8)
    assert table.remove(2 + GENERATION) == NONE  # another use of the page
    assert table.page_with(7) == 2
    assert table.page_with(8) == NONE
