"""The policy on the real tree: each victim against a search of all nodes, and its bookkeeping."""

from __future__ import annotations

import random

import pytest

from kvd.cache_check import check_cache
from kvd.node import Node
from kvd.policies import ghosts
from kvd.policies.age_bands import Run
from kvd.policies.hit_density import HitDensity, Rank
from kvd.policies.hit_history import LAST_PAGE, UNUSED, level_of
from kvd.policies.recompute_cost import TWICE_AT, recompute_cost
from tests.kvd.policies.asker import Asker

POOL = 120


def worth(policy: HitDensity, node: Node) -> tuple[float, int, int, int]:
    """By definition: the density of the last run's level and band, times what it costs."""
    rank: Rank = node.rank
    run = rank.runs[-1]
    density = policy._history.density[run.level][run.band] * 2 ** (run.cost / 2)
    return density, -run.band, run.level, run.cost


def ranks(asker: Asker) -> dict[int, Rank]:
    """By the number of each node's first page."""
    return {int.from_bytes(node.tokens[:4], "little"): node.rank for node in asker.policy}


def check_policy(asker: Asker) -> None:
    """HitDensity's, AgeBands' and Ghosts' invariants, by walking everything."""
    policy = asker.policy
    assert isinstance(policy, HitDensity)
    in_order = list(policy)
    assert len(in_order) == len(policy) == len(set(in_order))
    runs: list[Run] = []
    for node in in_order:
        rank: Rank = node.rank
        assert not node.protected and rank.runs
        assert 1 <= policy.portion(node) <= node.num_pages
        runs += rank.runs
    for ghost in policy._ghosts._ghosts.values():
        runs += ghost.runs
    by_age = [run for band in policy._bands._by_age for run in band]
    assert len(runs) == len(set(runs)) and set(runs) == set(by_age)
    for band, members in enumerate(policy._bands._by_age):
        for run in members:
            assert run.band == band
            assert run.band <= policy._history.band_of(policy._clock - run.since)
    if in_order:
        assert worth(policy, policy.victim()) == min(worth(policy, node) for node in in_order)


def conversations(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts that share a beginning, go on, and branch; some come once."""
    known = [[1, 2]]
    prompts = []
    for number in range(count):
        base = rng.choice(known[-12:])
        cut = rng.randint(1, len(base))
        fresh = [1000 * (number + 1) + i for i in range(rng.randint(0, 9))]
        prompts.append((base[:cut] + fresh)[:40] or base)
        known.append(prompts[-1])
    return prompts


@pytest.mark.parametrize("policy", ["density", "cost"])
@pytest.mark.parametrize("seed", range(6))
def test_victims_and_invariants_on_random_conversations(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    asker = Asker(policy, POOL)
    for number, prompt in enumerate(conversations(rng, 400)):
        while asker.open_prompts and (len(asker.open_prompts) > 1 or rng.random() < 0.6):
            asker.finish(rng.randrange(len(asker.open_prompts)))
        asker.begin(prompt)
        if number % 5 == 0 and asker.cache.tree.eviction.tenants[0].levels:
            check_policy(asker)
    check_cache(asker.cache)
    assert asker.cache.counters.published_pages > 3 * POOL, "or nothing was evicted"


def test_the_longest_unused_of_equals_goes_first() -> None:
    asker = Asker("density", 5)
    for page in (10, 20, 30, 40, 50, 60, 70):
        asker.ask([page])
    assert [asker.cached([n]) for n in (10, 20, 30, 40, 50, 60, 70)] == [0, 0, 1, 1, 1, 1, 1]


def test_of_prompts_that_came_once_the_last_pages_go_first() -> None:
    """One page of each, before any goes that another prompt could go on from."""
    asker = Asker("density", 10)
    for first in (10, 20, 30, 40, 50):
        asker.ask([first, first + 1])
    asker.ask([60, 61])
    assert [asker.cached([n, n + 1]) for n in (10, 20, 30, 40, 50, 60)] == [1, 1, 2, 2, 2, 2]


def test_a_last_page_that_is_used_is_as_good_as_any() -> None:
    asker = Asker("density", 10)
    asker.ask([1, 2, 3])
    assert [(run.level, run.num_pages) for run in ranks(asker)[1].runs] == [
        (UNUSED, 2),
        (LAST_PAGE, 1),
    ]
    asker.ask([1, 2, 3])
    assert [(run.level, run.num_pages) for run in ranks(asker)[1].runs] == [(level_of(1), 3)]


def test_what_a_prompt_does_not_share_with_the_next_stays_unused() -> None:
    """Cut, the upper pages count as used, each in its own run; those below keep their age."""
    asker = Asker("density", 20)
    asker.ask([1, 2, 3, 4, 5])
    asker.ask([1, 2, 8, 9])
    policy = asker.policy
    assert isinstance(policy, HitDensity)
    by_first = ranks(asker)
    assert [(run.start, run.num_pages) for run in by_first[3].runs] == [(2, 2), (4, 1)]
    assert by_first[3].runs[0].since < by_first[1].runs[0].since
    used = policy._history._used
    assert (sum(used[UNUSED]), sum(used[LAST_PAGE])) == (2, 0)
    asker.ask([1, 2, 3, 4])
    assert (sum(used[UNUSED]), sum(used[LAST_PAGE])) == (4, 0)
    assert [(run.level, run.num_pages) for run in ranks(asker)[5].runs if run.num_pages] == [
        (LAST_PAGE, 1)
    ]


def test_no_ghost_is_left_of_a_last_page() -> None:
    asker = Asker("density", 20)
    asker.ask([1, 2, 3])
    asker.ask(range(100, 120))
    policy = asker.policy
    assert isinstance(policy, HitDensity)
    (ghost,) = policy._ghosts._ghosts.values()
    assert (ghost.end, [run.num_pages for run in ghost.runs]) == (2, [2])
    asker.ask([1, 2, 5, 6])
    assert [(run.level, run.num_pages) for run in ranks(asker)[1].runs] == [
        (level_of(1), 2),
        (UNUSED, 1),
        (LAST_PAGE, 1),
    ]


def test_what_comes_back_is_known_from_its_ghost() -> None:
    """Evicted once and computed again, a prompt counts as used, though nothing of it was found."""
    asker = Asker("density", 20)
    asker.ask([1, 2, 3])
    asker.ask(range(100, 120))  # drives it out
    assert asker.cached([1, 2, 3]) == 0
    asker.ask([1, 2, 3])
    asker.ask([7, 8, 9])
    levels = {node.tokens[0]: node.rank.runs[0].level for node in asker.policy}
    assert (levels[1], levels[7]) == (level_of(1), UNUSED)


def test_new_pages_behind_what_came_back_go_alone() -> None:
    asker = Asker("density", 20)
    asker.ask([1, 2, 3, 4])
    asker.ask(range(100, 120))
    asker.ask([1, 2, 3, 4, 5, 6])
    policy = asker.policy
    (node,) = [n for n in policy if n.tokens[:1] == b"\x01"]
    rank: Rank = node.rank
    assert [run.num_pages for run in rank.runs] == [3, 2, 1]
    assert policy.portion(node) == 1
    policy.evicted(node, 0)  # nothing went: nothing changes
    assert policy.portion(node) == 1
    del node.tokens[-8 * 4 :], node.refs[-8:]
    policy.evicted(node, 1)
    assert policy.portion(node) == 2


def test_ghosts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghosts, "LEAST", 50)
    asker = Asker("density", 20)
    for first in range(100, 2100, 10):
        asker.ask([first, first + 1])
    policy = asker.policy
    assert isinstance(policy, HitDensity)
    assert len(policy._ghosts) == 50
    check_policy(asker)


def test_all_hits_at_one_moment_do_no_harm() -> None:
    """A clock that stands still: order and counts hold."""
    asker = Asker("density", 30)
    for prompt in conversations(random.Random(1), 200):
        asker.now = -1.0
        if len(prompt) <= 30:
            asker.ask(prompt)
        check_policy(asker)


def test_nodes_of_different_levels_stay_apart() -> None:
    asker = Asker("density", 100)
    asker.ask([1, 2])
    asker.ask([1, 2])
    asker.ask([1, 2, 3, 4])
    asker.ask([9])
    nodes = {bytes(n.tokens[:1]): n for n in asker.policy}
    assert {n.num_pages for n in nodes.values()} == {2, 1}
    assert [level_of(nodes[key].hits) for key in (b"\x01", b"\x03", b"\x09")] == [3, 1, 1]


def test_pages_far_into_a_prompt_cost_more() -> None:
    asker = Asker("cost", 4096 * 8)
    asker.ask(range(1, 1 + 3 * TWICE_AT // 8))
    (node,) = asker.policy
    assert recompute_cost(node) == round(2 * 1.3219)  # log2 of 1 + 1.5, in halves


def test_of_equally_used_prompts_the_cheap_one_goes_first_under_cost() -> None:
    long = list(range(1, 12_001))  # 96k tokens
    for policy, kept in (("density", 0), ("cost", 12_000)):
        asker = Asker(policy, 12_100)
        asker.ask(long)
        asker.ask(range(20_000, 20_100))
        asker.ask(range(30_000, 30_100))
        assert (asker.cached(long) == 12_000) == (kept == 12_000), policy
