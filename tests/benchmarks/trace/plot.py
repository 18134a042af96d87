"""The shares found as a picture."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(path: Path, capacities: Sequence[int], shares: Mapping[str, Sequence[float]]) -> None:
    """`shares` by policy, one a capacity. Raises ImportError where matplotlib is missing."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, each in shares.items():
        axis.plot(capacities, [100 * share for share in each], "o-", label=name)
    axis.set_xscale("log")
    axis.set_xlabel("pool, blocks of 512 tokens")
    axis.set_ylabel("% of the prompts' blocks found")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
