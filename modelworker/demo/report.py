"""What the demo prints: a line a request, and a verdict for each thing that it asserts."""

from __future__ import annotations

from modelworker.demo.client import Answer
from modelworker.demo.processes import DemoFailed

COLUMNS = f"{'':4}{'':42}{'prompt':>6}{'cached':>8}{'computed':>10}{'time':>9}"


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def columns() -> None:
    print(COLUMNS, flush=True)


def row(worker: str, what: str, answer: Answer, mark: str) -> None:
    """One request: what was asked of whom, what was cached, how long it took."""
    shown = what if len(what) <= 41 else what[:40] + "…"
    computed = answer.prompt_tokens - answer.cached_tokens
    print(
        f"{worker:4}{shown:42}{answer.prompt_tokens:6}{answer.cached_tokens:8}{computed:10}"
        f"{answer.seconds * 1000:6.0f} ms  {mark}",
        flush=True,
    )


class Verdicts:
    """Collects assertions, prints each, and fails at the end if one was false."""

    def __init__(self) -> None:
        self._failed: list[str] = []

    def check(self, holds: bool, what: str) -> None:
        print(f"  {'✓' if holds else '✗'} {what}", flush=True)
        if not holds:
            self._failed.append(what)

    def conclude(self) -> None:
        """Raises DemoFailed naming what was false."""
        if self._failed:
            raise DemoFailed("not so: " + "; ".join(self._failed))
