"""The chat workload and the plain model of an exact LRU that its golden hit rates come from."""

from __future__ import annotations

import pytest

from tests.benchmarks.chat import ROOMY, ROOMY_HIT_RATE, Turn, exact_lru_hit_rate, turns
from tests.benchmarks.daemon_chat import chat_turn
from tests.benchmarks.workload import Garden, Tokens


def test_the_workload_is_seeded_and_every_prompt_continues_the_one_before() -> None:
    one, again = list(turns(5)), list(turns(5))
    assert one == again and len(one) == 4000
    before: dict[int, bytes] = {}
    for turn in one:
        assert turn.prompt.startswith(before.get(turn.conversation, turn.prompt[: 2048 * 4]))
        assert len(turn.whole) - len(turn.prompt) == 200 * 4
        before[turn.conversation] = turn.whole
    assert {len(text) for text in before.values()} == {(2048 + 20 * 300) * 4}
    assert len({text[: 2048 * 4] for text in before.values()}) == 1


def test_with_room_for_all_the_hit_rate_is_the_peers() -> None:
    assert exact_lru_hit_rate(list(turns(9)), ROOMY) == pytest.approx(ROOMY_HIT_RATE, abs=5e-5)


def test_the_model_on_a_case_computed_by_hand() -> None:
    """Pages of 16 tokens, room for 4. Conversation 1: 32 tokens, of which 2 pages stay. The same
    prompt again finds 1 page (never the last token). Conversation 2 takes 3 pages: the model has
    2 free, so the last page of conversation 1 goes, its first one stays and is found again."""
    one, two = Tokens(1).take(32), Tokens(2).take(48)
    every = [Turn(1, one, one), Turn(1, one, one), Turn(2, two, two), Turn(1, one, one)]
    assert exact_lru_hit_rate(every, 4) == (0 + 16 + 0 + 16) / (32 + 32 + 48 + 32)
    assert exact_lru_hit_rate(every, 3) == (0 + 16 + 0 + 0) / (32 + 32 + 48 + 32)


@pytest.mark.parametrize("num_pages", [700, 2000, 6000])
def test_the_core_finds_what_the_model_finds(num_pages: int) -> None:
    """The first turns of the workload, in pools in which much, little or nothing is evicted."""
    every = list(turns(3))[:400]
    garden = Garden(num_pages)
    for turn in every:
        chat_turn(garden, turn)
    counters = garden.cache.counters
    found = counters.tokens_matched / counters.tokens_asked
    assert found == pytest.approx(exact_lru_hit_rate(every, num_pages), abs=1e-12)
