from __future__ import annotations

from typing import Any

import pytest
import torch

from modelworker.requests import SamplingParams
from modelworker.sampler import candidates, new_generator, sample

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.0, 2.5])
RANKED = [1, 5, 3, 0, 4, 2]
PROBABILITIES = LOGITS.softmax(dim=0)


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1, **changes)


def draws(count: int, seed: int = 0, **changes: Any) -> list[int]:
    generator = new_generator(seed)
    tokens = [sample(LOGITS[None], [params(**changes)], [generator])[0] for _ in range(count)]
    return [token for token in tokens if token is not None]


def kept(**changes: Any) -> list[int]:
    """Token ids that may be drawn, likeliest first."""
    probabilities, ids = candidates(LOGITS, params(**changes))
    assert bool((probabilities > 0).all())
    return list(range(len(LOGITS))) if ids is None else ids.tolist()


def test_temperature_zero_is_greedy_and_draws_nothing() -> None:
    generator = new_generator(0)
    before = generator.get_state()
    assert sample(LOGITS[None], [params(temperature=0.0)], [generator]) == [1]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, 1), (2, 2), (5, 5), (6, 6), (7, 6), (10**9, 6)]
)
def test_top_k_keeps_the_k_likeliest_or_all_that_there_are(top_k: int, expected: int) -> None:
    assert kept(top_k=top_k) == RANKED[:expected]


def test_top_p_keeps_the_fewest_tokens_whose_share_reaches_it() -> None:
    ranked = PROBABILITIES[RANKED].double()
    for count in range(1, len(LOGITS)):
        share = float(ranked[:count].sum())
        assert kept(top_p=share - 1e-4) == RANKED[:count]
        assert kept(top_p=share + 1e-4) == RANKED[: count + 1]


def test_a_share_that_is_reached_exactly_is_enough() -> None:
    halves, _ = candidates(torch.zeros(2), params(top_p=0.5))
    assert len(halves) == 1


@pytest.mark.parametrize("top_p", [0.0, 1e-30, 1e-3])
def test_a_tiny_top_p_keeps_the_best_token(top_p: float) -> None:
    assert kept(top_p=top_p) == [1]


def test_everything_is_kept_by_default() -> None:
    probabilities, ids = candidates(LOGITS, params())
    assert ids is None
    torch.testing.assert_close(probabilities, PROBABILITIES)


def test_top_p_counts_shares_of_what_top_k_left() -> None:
    of_two = float(PROBABILITIES[1] / (PROBABILITIES[1] + PROBABILITIES[5]))
    assert kept(top_k=2, top_p=of_two - 1e-4) == [1]
    assert kept(top_k=2, top_p=of_two + 1e-4) == [1, 5]


def test_temperature_is_applied_before_top_p() -> None:
    hot = (LOGITS / 5).softmax(dim=0)[RANKED]
    assert kept(temperature=5.0, top_p=float(hot[:4].sum()) - 1e-4) == RANKED[:4]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    assert draws(50, temperature=temperature) == [1] * 50


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, RANKED),
        ({"temperature": 2.0}, RANKED),
        ({"top_k": 3}, RANKED[:3]),
        ({"top_p": 0.95}, RANKED[:4]),
    ],
    ids=["plain", "hot", "top_k", "top_p"],
)
def test_draws_follow_the_distribution(changes: dict[str, Any], possible: list[int]) -> None:
    """Chi-square against the exact probabilities, at the 0.1 % level; the seed is fixed."""
    n = 6000
    counts = torch.bincount(torch.tensor(draws(n, seed=1, **changes)), minlength=len(LOGITS))
    assert int(counts[possible].sum()) == n
    exact = n * (LOGITS[possible] / changes.get("temperature", 1.0)).softmax(dim=0)
    chi_square = float(((counts[possible] - exact).square() / exact).sum())
    critical = {2: 13.82, 3: 16.27, 5: 20.52}  # by degrees of freedom
    assert chi_square < critical[len(possible) - 1]


def test_the_seed_decides() -> None:
    assert draws(30, seed=5) == draws(30, seed=5)
    assert draws(30, seed=5) != draws(30, seed=6)
    assert new_generator(5, index=1).initial_seed() != new_generator(5).initial_seed()
    assert new_generator(None).initial_seed() != new_generator(None).initial_seed()
    assert new_generator(-1).initial_seed() == new_generator(2**63 - 1).initial_seed()


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0), LOGITS * 0])
    wanted = [params(), params(temperature=0.0), params(top_k=2, top_p=0.9)]
    together = [new_generator(i) for i in range(3)]
    alone = [new_generator(i) for i in range(3)]
    for _ in range(20):
        one_by_one = [
            sample(row[None], [p], [g])[0] for row, p, g in zip(rows, wanted, alone, strict=True)
        ]
        assert sample(rows, wanted, together) == one_by_one


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_nonsense_is_never_sampled_from(temperature: float, bad: str) -> None:
    rows = torch.stack([LOGITS, LOGITS])
    rows[1, 2] = float(bad)
    asked = [params(temperature=temperature)] * 2
    tokens = sample(rows, asked, [new_generator(0), new_generator(1)])
    assert tokens[0] is not None
    assert tokens[1] is None


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    asked = [params(temperature=1e-46), params(temperature=0)]
    tiny, greedy = sample(LOGITS.repeat(2, 1), asked, [new_generator(0), new_generator(1)])
    assert tiny == greedy


def test_forbidden_tokens_stay_forbidden() -> None:
    row = LOGITS.clone()
    row[1] = -float("inf")
    generator = new_generator(0)
    assert 1 not in [sample(row[None], [params()], [generator])[0] for _ in range(200)]
