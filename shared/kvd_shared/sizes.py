"""Amounts of memory as people write and read them: "64MiB", "4096 pages"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

UNIT_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How much a pool holds; how many pages a number of bytes is depends on the layout."""

    amount: int
    unit: Literal["bytes", "pages"]

    @classmethod
    def parse(cls, text: str) -> PoolSize:
        """Reads `256MiB`, `1.5 GiB` or `4096 pages`. Raises ValueError saying what is wrong.

        A number without a unit is refused, since bytes and pages are both likely meanings.
        """
        match = _AMOUNT.fullmatch(text)
        units = {unit.lower(): unit for unit in UNIT_BYTES}
        number, unit = match.groups() if match else ("", "")
        if unit.lower() in ("page", "pages") and "." not in number:
            return cls(int(number), "pages")
        if unit.lower() not in units:
            raise ValueError(f"must be like 256MiB or 4096 pages (units: {_units()})")
        whole, _, fraction = number.partition(".")
        scale = UNIT_BYTES[units[unit.lower()]]
        # in whole numbers, so that large amounts are exact
        extra = int(fraction) * scale // 10 ** len(fraction) if fraction else 0
        return cls(int(whole) * scale + extra, "bytes")

    def num_pages(self, page_bytes: int) -> int:
        """Whole pages that fit."""
        return self.amount if self.unit == "pages" else self.amount // page_bytes

    def __str__(self) -> str:
        return f"{self.amount} pages" if self.unit == "pages" else format_bytes(self.amount)


def _units() -> str:
    return ", ".join([*UNIT_BYTES, "pages"])


def format_bytes(num_bytes: int) -> str:
    """Three digits are enough to read: `2.25 MiB`, `38.4 GiB`, `512 B`."""
    name, scale = max(
        ((n, s) for n, s in UNIT_BYTES.items() if s <= num_bytes),
        key=lambda unit: unit[1],
        default=("B", 1),
    )
    value = num_bytes / scale
    digits = 0 if value >= 100 or scale == 1 else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {name}"
