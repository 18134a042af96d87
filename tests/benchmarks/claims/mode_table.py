"""All modes side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from tests.benchmarks.claims.modes import NUM_SLOTS
from tests.benchmarks.claims.plan import Outcome

COLUMNS: dict[str, Callable[[Outcome], float]] = {
    "at once": lambda o: o.memory.running,
    "waste, %": lambda o: 100 * o.memory.waste,
    "memory that holds tokens, %": lambda o: 100 * o.memory.used / NUM_SLOTS,
    "steps": lambda o: o.num_steps,
    "tokens/step": lambda o: o.tokens_a_step,
    "tokens/s here": lambda o: o.tokens_a_second,
}


def medians(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, dict[str, float]]:
    """Of each mode's runs, by column."""
    return {
        mode: {name: statistics.median(map(value, runs)) for name, value in COLUMNS.items()}
        for mode, runs in outcomes.items()
    }


def as_text(modes: Mapping[str, Mapping[str, float]]) -> str:
    width = max(map(len, modes))
    lines = [" " * width + "".join(f"  {name}" for name in COLUMNS)]
    for mode, values in modes.items():
        cells = (f"  {values[name]:{len(name)}.1f}" for name in COLUMNS)
        lines.append(mode.ljust(width) + "".join(cells))
    return "\n".join(lines)
