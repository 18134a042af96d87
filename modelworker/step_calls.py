"""The calls of one engine step, to be made in one round trip, and what to do with each answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.errors import KvdError
from kvd_shared.verbs import MAX_CALLS_A_STEP

T = TypeVar("T")
Perform = Callable[[Call[list[Any]]], list[Any]]


def must_succeed(_: object) -> None:
    """For calls that only a bug makes fail; the answer itself says nothing."""


class StepCalls:
    """An ordered list of calls. What gives back comes before what asks."""

    def __init__(self) -> None:
        self._calls: list[tuple[Call[Any], Callable[[Any], None], bool]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call[T], then: Callable[[T], None] = must_succeed) -> None:
        """`then` gets the result; an error is raised out of `make`."""
        self._calls.append((call, then, False))

    def ask(self, call: Call[T], then: Callable[[T | KvdError], None]) -> None:
        """`then` gets the result or the error: for what may be refused."""
        self._calls.append((call, then, True))

    def make(self, perform: Perform) -> None:
        """Make all calls in one step (or several, if one cannot take them) and hand out the answers
        in order. Calls that an answer adds wait for the next time. Raises the first error of a
        call that had to succeed, after the others were handed out."""
        calls, self._calls = self._calls, []
        if not calls:
            return
        failed: KvdError | None = None
        answers: list[Any] = []
        for start in range(0, len(calls), MAX_CALLS_A_STEP):
            batch = calls[start : start + MAX_CALLS_A_STEP]
            answers += perform(verbs.step([call for call, _, _ in batch]))
        for (_, then, may_fail), answer in zip(calls, answers, strict=True):
            if isinstance(answer, KvdError) and not may_fail:
                failed = failed or answer
            else:
                then(answer)
        if failed is not None:
            raise failed
