"""The calls of one step of a light worker, made in one round trip, and what to do with each answer.

Every answer is a result, or an error that may come here; anything else is a violation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.errors import KvdError
from tests.chaos.history import Counter, History

T = TypeVar("T")
Refused = KvdError


class StepCalls:
    """An ordered list of calls: give back first, then ask."""

    def __init__(self, history: History) -> None:
        self._calls: list[tuple[Call[Any], Callable[[Any], None], tuple[str, ...]]] = []
        self._history = history

    def add(self, call: Call[T], then: Callable[[T], Any] = lambda _: None) -> None:
        """One that nothing but a bug can refuse."""
        self._calls.append((call, then, ()))

    def ask(
        self, call: Call[T], then: Callable[[T | Refused], Any], may_be: tuple[str, ...]
    ) -> None:
        """One that may be refused with these codes; `then` gets the error."""
        self._calls.append((call, then, may_be))

    def make(self, perform: Callable[[Call[list[Any]]], list[Any]]) -> None:
        """Raises what the step as a whole was refused with."""
        calls, self._calls = self._calls, []
        if not calls:
            return
        answers = perform(verbs.step([call for call, _, _ in calls]))
        for (call, then, may_be), answer in zip(calls, answers, strict=True):
            if isinstance(answer, KvdError):
                if answer.code not in may_be:
                    self._history.violation(
                        "an operation was refused", op=call.op, code=answer.code, text=str(answer)
                    )
                    continue
                no_pages = answer.code == "NO_PAGES"
                self._history.count(Counter.NO_PAGES if no_pages else Counter.REFUSED)
            then(answer)
