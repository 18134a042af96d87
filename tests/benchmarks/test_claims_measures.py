"""What bench-claims counts, by hand; and the requests that it makes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from modelworker.sequence import Sequence
from tests.benchmarks.claims.conversations import (
    BLOCK,
    CUE,
    QUOTE,
    SCALE,
    Request,
    endless_cache,
    made_up,
    read_trace,
    sample,
    to_asks,
)
from tests.benchmarks.claims.experiments import Facts
from tests.benchmarks.claims.measured import Meter, paged_usage
from tests.benchmarks.claims.modes import MODES, WHOLE
from tests.benchmarks.claims.plan import Ask, Outcome, Plan, Usage
from tests.benchmarks.claims.rows import rows
from tests.benchmarks.claims.sharing import Shared


def sequence(num_tokens: int, *refs: int) -> Sequence:
    return cast(Sequence, SimpleNamespace(num_tokens=num_tokens, refs=list(refs)))


def test_a_shared_page_is_taken_once_and_only_tails_are_unused() -> None:
    usage = paged_usage([sequence(40, 1, 2, 3), sequence(33, 1, 2, 4), sequence(17, 9, 8)], 16)
    assert usage == Usage(running=3, taken=6 * 16, used=6 * 16 - 8 - 15 - 15)


def test_a_sequence_that_waits_for_its_next_page_wastes_nothing() -> None:
    assert paged_usage([sequence(17, 1)], 16).waste == 0


def test_the_meter_weighs_by_time_while_requests_wait() -> None:
    times = iter([0.0, 1.0, 4.0, 10.0])
    meter = Meter(lambda: next(times))
    meter.step(Usage(1, 100, 50), 7, True)  # for 1 s
    meter.step(Usage(2, 200, 200), 1, True)  # for 3 s
    meter.step(Usage(9, 900, 9), 1, False)  # nobody waits any more
    meter.step(Usage(9, 900, 9), 1, False)
    mean = meter.mean()
    assert mean is not None
    assert (mean.running, mean.taken) == (1.75, 175.0)
    assert mean.waste == pytest.approx(1 - (50 + 3 * 200) / (100 + 3 * 200))
    assert (meter.num_steps, meter.computed_tokens) == (4, 10)


def test_a_run_in_which_nobody_waited_shows_nothing() -> None:
    meter = Meter()
    meter.step(Usage(1, 16, 16), 1, False)
    assert meter.mean() is None
    with pytest.raises(ValueError, match="more requests"):
        _ = outcome(usage=None).memory


def test_plans_and_outcomes_travel_unchanged() -> None:
    asks = [Ask((5, 6, 7), 2), Ask((8,), 1)]
    for mode in MODES:
        plan = mode.plan(asks, "salt")
        assert Plan.from_json(plan.to_json()) == plan
    for usage in (None, Usage(1.5, 16, 8)):
        done = outcome(usage=usage)
        assert Outcome.from_json(done.to_json()) == done


def test_prompts_are_equal_as_far_as_the_trace_says() -> None:
    one, two = Request(3 * BLOCK, 160, (0, 1, 2)), Request(5 * BLOCK, 80, (0, 1, 2, 3, 4))
    first, second = to_asks([one, two], seed=1)
    assert len(first.prompt) == 3 * BLOCK // SCALE and first.num_tokens == 10
    common = len(first.prompt) - 1 - CUE
    assert first.prompt[:common] == second.prompt[:common]
    assert first.prompt[common] == QUOTE
    document, cue = second.prompt[: -1 - CUE], second.prompt[-CUE:]
    assert any(document[i : i + CUE] == cue for i in range(len(document)))
    assert to_asks([one], seed=2)[0].prompt != first.prompt


def test_a_sample_has_whole_conversations_in_order() -> None:
    trace = [Request(1000, 10, (0, i % 7, 100 + i)) for i in range(70)]
    trace.append(Request(10**6, 10, (0, 1, 999)))  # longer than the context
    chosen = sample(trace, 20, seed=3)
    assert len(chosen) == 20 and chosen == sorted(chosen, key=trace.index)
    conversations = {request.hash_ids[1] for request in chosen}
    assert len(conversations) == 2
    assert sample(trace, 20, seed=3) == chosen and trace[-1] not in chosen


def test_without_the_trace_lengths_are_like_it() -> None:
    fitting = [request for request in made_up() if request.fits]
    inputs = sorted(request.input_length for request in fitting)
    assert 5500 < inputs[len(inputs) // 2] < 7500
    assert all(
        r.output_length <= 2000 and -(-r.input_length // BLOCK) == len(r.hash_ids) for r in fitting
    )
    assert 0.2 < endless_cache(to_asks(sample(fitting, 100, 1), 1), 16) < 0.6


def test_an_endless_cache_finds_whole_pages_and_never_all() -> None:
    asks = [Ask((1,) * 16 + (2,) * 16, 1), Ask((1,) * 16 + (3,) * 16, 1), Ask((1,) * 16, 1)]
    assert endless_cache(asks, 8) == pytest.approx((0 + 16 + 8) / (32 + 32 + 16))


@pytest.mark.parametrize(
    "line",
    ['{"input_length": 1}', "{", "[]", '{"input_length": 1, "output_length": 2, "hash_ids": 3}'],
)
def test_a_bad_trace_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    good = json.dumps({"input_length": 600, "output_length": 2, "hash_ids": [0, 1]})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 2"):
        read_trace(path)


def outcome(**changes: Any) -> Outcome:
    fields: dict[str, Any] = {"wall_s": 2.0, "cpu_s": 2.0, "num_steps": 10, "computed_tokens": 5}
    fields |= {"cached_tokens": 50, "usage": Usage(20, 100, 98), "answers": [[1, 2], [3]]}
    return Outcome(**(fields | changes))


def facts() -> Facts:
    found = Facts(prompt_tokens=[100], endless=[0.6], num_answers=4)
    for runs in found.outcomes.values():
        runs.append(outcome())
    found.outcomes[WHOLE.name] = [outcome(num_steps=30, usage=Usage(8, 100, 30))]
    for pairs in found.system.values():
        pairs.append((Shared(100, 2.0, 9, []), Shared(40, 1.0, 4, [])))
    return found


def verdicts(found: Facts) -> dict[str, bool]:
    return {row.name: row.passed for row in rows(found) if row.passed is not None}


def test_claims_that_hold_pass() -> None:
    assert len(verdicts(facts())) == 7 and all(verdicts(facts()).values())


def test_each_claim_can_fail() -> None:
    found = facts()
    for runs in found.outcomes.values():
        runs[:] = [outcome(cached_tokens=20, usage=Usage(20, 100, 95))]
    for pairs in found.system.values():
        pairs[:] = [(Shared(100, 2.0, 9, []), Shared(60, 1.0, 4, []))]
    found.num_different = 1
    assert len(verdicts(found)) == 7 and not any(verdicts(found).values())
