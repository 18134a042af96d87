"""The cache core does what its reference model does, whatever it is asked."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvd.cache
import kvd.holdings
from kvd.metadata import Metadata
from tests.kvd import pairing
from tests.kvd.random_workers import NAMES, OPERATIONS, Step, play, random_steps

SEQUENCES_A_SEED = 100
STEP = st.tuples(st.sampled_from(NAMES), st.integers(0, 1 << 32))
STEPS = st.integers(1, 40).flatmap(lambda n: st.lists(STEP, min_size=n, max_size=n))


@given(seed=st.integers(0, 1 << 16), steps=STEPS)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_whatever_is_asked(seed: int, steps: list[Step]) -> None:
    """Here a failure is shown with as few operations as it needs."""
    play(seed, steps)


@pytest.mark.parametrize("seed", range(10))
def test_at_random(seed: int) -> None:
    for i in range(SEQUENCES_A_SEED):
        rng = random.Random(seed * SEQUENCES_A_SEED + i)
        play(seed * SEQUENCES_A_SEED + i, random_steps(rng, 40), check_every=1, strict=i % 4 == 0)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_put_off_can_be_done_in_the_smallest_portions(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node or page of the dead, doomed or expired at a time, and anything between two."""
    monkeypatch.setattr(kvd.cache, "SWEEP_NODES", 1)
    monkeypatch.setattr(kvd.holdings, "SWEEP_PAGES", 1)
    rng = random.Random(seed)
    often = ["release_session", "flush", "pass_time", "sweep", "sweep", "sweep"]
    for i in range(SEQUENCES_A_SEED):
        steps = random_steps(rng, 40)
        for at in range(3, len(steps), 3):
            steps[at] = rng.choice(often), rng.getrandbits(32)
        play(i, steps, strict=False)


def test_memory_that_nobody_keeps_is_used_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pairing,
        "small_metadata",
        lambda pages, page_size: Metadata.in_memory(pages, page_size, recorded=False),
    )
    for i in range(SEQUENCES_A_SEED):
        play(i, random_steps(random.Random(i), 40), strict=False)


def test_every_operation_has_its_turn() -> None:
    assert set(NAMES) == OPERATIONS.keys()
