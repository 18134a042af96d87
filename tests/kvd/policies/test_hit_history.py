"""What the counts say: levels, bands, and the density against its definition."""

from __future__ import annotations

import random

import pytest

from kvd.policies.hit_history import (
    BANDS,
    LAST_PAGE,
    LEVELS,
    UNUSED,
    HitHistory,
    densities,
    level_of,
)


def test_levels() -> None:
    levels = [level_of(uses) for uses in (0, 1, 2, 3, 4, 7, 8, 9, 1000)]
    assert levels == [UNUSED, 2, 3, 3, 4, 4, 5, 5, 5]
    assert LAST_PAGE not in levels


def test_bands_double_and_the_last_is_open() -> None:
    history = HitHistory(3200)
    assert history.edges[:4] == [0, 100, 200, 400]
    assert [history.band_of(age) for age in (0, 99, 100, 199, 200)] == [0, 0, 1, 1, 2]
    assert history.band_of(10**9) == BANDS - 1


@pytest.mark.parametrize("seed", range(20))
def test_density_is_the_best_over_all_ages_to_give_up_at(seed: int) -> None:
    rng = random.Random(seed)
    chances = [rng.choice([0.0, rng.random(), rng.random() / 100]) for _ in range(8)]
    widths = [float(rng.randint(1, 100)) for _ in range(8)]
    for start, density in enumerate(densities(chances, widths)):
        best = uses = time = 0.0
        through = 1.0
        for chance, width in zip(chances[start:], widths[start:], strict=True):
            uses += through * chance
            time += through * width * (1 - chance / 2)
            through *= 1 - chance
            best = max(best, uses / time)
        assert density == pytest.approx(best)


def test_without_experience_it_is_lru_among_equally_used_pages() -> None:
    for row in HitHistory(1000).density:
        assert row == sorted(row, reverse=True)


def test_what_was_used_before_is_worth_more_at_first() -> None:
    density = HitHistory(1000).density
    for band in range(BANDS):
        column = [density[level][band] for level in range(len(LEVELS))]
        assert column == sorted(column)


def test_a_band_in_which_pages_are_used_is_worth_waiting_for() -> None:
    """A loop over more than the pool: nothing is used young, all of it later."""
    history = HitHistory(1000)
    for _ in range(20):
        for band in range(6):
            history.reached(0, band, 1000)
        history.used(0, int(history.edges[5]), 900)
        history.learn()
    young, due, over = history.density[0][0], history.density[0][5], history.density[0][6]
    assert young < due, "what has been kept for long is closer to its next use"
    assert over < due


def test_it_forgets() -> None:
    history = HitHistory(1000)
    history.reached(1, 0, 1000)
    history.used(1, 0, 1000)
    history.learn()
    often = history.density[1][0]
    for _ in range(500):
        history.reached(1, 0, 10)
        history.learn()
    assert history.density[1][0] < often / 2
