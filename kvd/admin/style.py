"""Text for terminals: colours where they are wanted, tables, amounts as people read them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

COLORS = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}


@dataclass(frozen=True, slots=True)
class Style:
    """How wide the page is, and whether it has colours."""

    color: bool = False
    width: int = 80

    @classmethod
    def of(cls, stream: TextIO, env: Mapping[str, str]) -> Style:
        """Colours only on a terminal, and not when NO_COLOR is set to anything."""
        is_terminal = stream.isatty()
        width = shutil.get_terminal_size().columns if is_terminal else 80
        return cls(is_terminal and not env.get("NO_COLOR"), max(width, 40))

    def paint(self, text: str, color: str) -> str:
        return f"\x1b[{COLORS[color]}m{text}\x1b[0m" if self.color and text else text


def printable(text: str) -> str:
    """`text` without what could steer a terminal: names are chosen by whoever attaches."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shortened(text: str) -> str:
    """Of a fingerprint or digest as much as tells it from others."""
    return text if len(text) <= 12 else f"{text[:12]}…"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def duration(seconds: float) -> str:
    """The two largest units: `3d 4h`, `12m 5s`; `0.4s` when short."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def count(number: int, noun: str) -> str:
    """`1 page`, `12,000 pages`"""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def table(head: Sequence[str], rows: Sequence[Sequence[str | int]], style: Style) -> str:
    """Columns as wide as their widest cell; numbers to the right. Colours the head only."""
    cells = [[f"{c:,}" if isinstance(c, int) else c for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    numeric = [bool(rows) and isinstance(c, int) for c in (rows[0] if rows else head)]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([style.paint(line(head), "bold"), *map(line, cells)])


def key_values(rows: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """One `key  value` a line, the values below each other."""
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{indent}{key.ljust(width)}  {value}".rstrip() for key, value in rows)
