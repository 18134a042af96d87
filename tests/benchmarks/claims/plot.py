"""The run as a picture; needs matplotlib."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.claims.modes import NUM_SLOTS
from tests.benchmarks.claims.plan import Usage

USED, UNUSED, MARK = "#2b6cb0", "#e2a03f", "#9b2c2c"


def draw(
    path: Path, usages: Mapping[str, Sequence[Usage]], saved: Mapping[int, Sequence[float]]
) -> None:
    """`usages` of each mode and `saved` of each system prompt (in tokens), one a seed. Raises
    ImportError where matplotlib is missing."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    figure, (memory, running, sharing) = plt.subplots(
        1, 3, figsize=(14, 4.2), width_ratios=(3, 2, 2)
    )
    names = [name.replace(", ", ",\n") for name in usages]
    used = [_median(u.used for u in each) / NUM_SLOTS * 100 for each in usages.values()]
    taken = [_median(u.taken for u in each) / NUM_SLOTS * 100 for each in usages.values()]
    memory.barh(names, used, color=USED, label="hold a token")
    unused = [t - u for t, u in zip(taken, used, strict=True)]
    memory.barh(names, unused, left=used, color=UNUSED, label="taken, unused")
    memory.set_xlabel("% of the slots, while requests wait")
    memory.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    running.barh(names, [_median(u.running for u in each) for each in usages.values()], color=USED)
    running.set_yticks([])
    running.set_xlabel("sequences at once")
    sharing.plot(list(saved), [_median(each) for each in saved.values()], "o-", color=USED)
    sharing.axhline(50, color=MARK, linestyle="--", linewidth=1)
    sharing.set_xlabel("shared system prompt, tokens")
    sharing.set_ylabel("% of the pages saved")
    sharing.set_ylim(0, 100)
    for axis in (memory, running):
        axis.invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _median(values: Any) -> float:
    return statistics.median(values)
