"""A line that shows how far long work is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

SHOWN_AFTER_S = 1.0  # what takes less shows nothing
REDRAWN_EVERY_S = 0.2


@contextmanager
def progress_line(stream: TextIO, what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of (bytes done, bytes in all). Rewrites one line on a terminal; in a log
    it writes a line each tenth."""
    start = time.monotonic()
    terminal = stream.isatty()
    shown_s, shown_tenth = start + SHOWN_AFTER_S - REDRAWN_EVERY_S, 0
    drawn = False

    def show(done: int, total: int) -> None:
        nonlocal shown_s, shown_tenth, drawn
        now, tenth = time.monotonic(), done * 10 // max(total, 1)
        if now - shown_s < REDRAWN_EVERY_S or (not terminal and tenth == shown_tenth):
            return
        shown_s, shown_tenth, drawn = now, tenth, True
        text = f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB ({done / max(total, 1):.0%})"
        stream.write(f"\r{text}" if terminal else f"{text}\n")
        stream.flush()

    try:
        yield show
    finally:
        if drawn and terminal:
            stream.write("\n")
