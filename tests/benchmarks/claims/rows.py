"""What was found, held against what is claimed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from tests.benchmarks.claims.experiments import Facts
from tests.benchmarks.claims.modes import EXACT, LONGEST, PAGED, SHARED, WHOLE, Mode
from tests.benchmarks.claims.plan import Outcome
from tests.benchmarks.harness import Row

PROMISED_SYSTEM_PROMPT = 512  # tokens: 8k of a service's, scaled as the trace is


def rows(facts: Facts) -> Iterator[Row]:
    """Medians over the seeds; each value and the spread are in the details."""
    yield from _memory(facts)
    yield from _throughput(facts)
    yield from _sharing(facts)
    yield _row(
        "answers that differ between modes",
        [facts.num_different],
        "",
        target=0,
        note=f"of {facts.num_answers}; greedy; where rounding decides a near-tie does not count",
    )


def saved_pages(facts: Facts) -> dict[int, list[float]]:
    """Per cent, by the tokens of the system prompt, one a seed."""
    return {
        tokens: [100 * (1 - shared.peak_pages / alone.peak_pages) for alone, shared in measured]
        for tokens, measured in facts.system.items()
    }


def _memory(facts: Facts) -> Iterator[Row]:
    def waste(mode: Mode) -> list[float]:
        return [100 * outcome.memory.waste for outcome in facts.outcomes[mode.name]]

    yield _row(
        "waste, pages",
        waste(PAGED),
        "%",
        target=4,
        note="slots taken that hold no token, over slots taken; claimed: < 4 %, against 60 to 80 %",
    )
    yield _row("waste, contexts reserved", waste(WHOLE), "%", target=60, higher_is_better=True)

    def gain(over: Mode) -> list[float]:
        return _ratios(facts, PAGED, over, lambda outcome: outcome.memory.running)

    yield _row(
        "sequences at once, pages over contexts",
        gain(WHOLE),
        "x",
        target=2,
        aim=4,
        higher_is_better=True,
        note="claimed: 2 to 4 times",
    )
    for mode in (LONGEST, EXACT):
        name = f"sequences at once, pages over {mode.name}"
        yield _row(name, gain(mode), "x", higher_is_better=True)


def _throughput(facts: Facts) -> Iterator[Row]:
    gain = _ratios(facts, PAGED, WHOLE, lambda outcome: outcome.tokens_a_step)
    yield _row(
        "tokens per step, pages over contexts",
        gain,
        "x",
        target=2,
        aim=4,
        higher_is_better=True,
        note="claimed: 2 to 4 times the throughput; so it is where a step takes as long for many "
        "sequences as for a few (a GPU that reads weights), which it does not here:",
    )
    slower = _ratios(facts, PAGED, WHOLE, lambda outcome: outcome.cpu_s / outcome.num_steps)
    yield _row("time of a step, pages over contexts", slower, "x")
    for mode, name in ((PAGED, "pages"), (SHARED, "pages, shared,")):
        faster = _ratios(facts, mode, WHOLE, lambda outcome: outcome.tokens_a_second)
        name = f"tokens/s on this CPU, {name} over contexts"
        yield _row(name, faster, "x", higher_is_better=True)
    yield _row(
        "a decode step, what contiguous K and V save",
        [100 * facts.contiguous_saves],
        "%",
        note="8 sequences of 512 tokens; the baseline gathers pages here, and would not need to",
    )


def _sharing(facts: Facts) -> Iterator[Row]:
    for tokens, saved in saved_pages(facts).items():
        promised = tokens == PROMISED_SYSTEM_PROMPT
        yield _row(
            f"pages saved, system prompt of {tokens}",
            saved,
            "%",
            target=50 if promised else None,
            higher_is_better=True,
            note="claimed: half or more, with a long system prompt" if promised else "",
        )
    measured = facts.system[PROMISED_SYSTEM_PROMPT]
    faster = [alone.cpu_s / shared.cpu_s for alone, shared in measured]
    name = f"tokens/s on this CPU, system prompt of {PROMISED_SYSTEM_PROMPT}, shared over not"
    yield _row(name, faster, "x", higher_is_better=True)
    found = [
        100 * outcome.cached_tokens / total
        for outcome, total in zip(facts.outcomes[SHARED.name], facts.prompt_tokens, strict=True)
    ]
    yield _row("prompt tokens not computed, trace", found, "%", higher_is_better=True)
    yield _row(
        "... over what endless whole pages would find",
        [share / endless for share, endless in zip(found, facts.endless, strict=True)],
        "%",
        target=50,
        higher_is_better=True,
    )


def _ratios(facts: Facts, mode: Mode, over: Mode, value: Callable[[Outcome], float]) -> list[float]:
    pairs = zip(facts.outcomes[mode.name], facts.outcomes[over.name], strict=True)
    return [value(a) / value(b) for a, b in pairs]


def _row(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    target: float | None = None,
    aim: float | None = None,
    higher_is_better: bool = False,
    note: str = "",
) -> Row:
    return Row(
        name=name,
        value=statistics.median(values),
        unit=unit,
        target=target,
        aim=aim,
        higher_is_better=higher_is_better,
        note=note,
        details={"values": list(values), "spread": max(values) - min(values)},
    )
