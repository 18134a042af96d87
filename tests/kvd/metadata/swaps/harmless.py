"""The list."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[4]


@dataclass(frozen=True)
class Swap:
    file: str
    reason: str
    old: str
    new: str


def load() -> list[Swap]:
    text = (Path(__file__).parent / "harmless.toml").read_text()
    return [Swap(**one) for one in tomllib.loads(text)["swap"]]
