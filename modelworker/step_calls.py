"""The calls of one engine step, to be made in one round trip, and what to do with each answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.errors import DaemonTimeout, DeadlineExceeded, KvdError
from kvd_shared.verbs import MAX_CALLS_A_STEP

T = TypeVar("T")
Asked = tuple[Call[Any], Callable[[Any], None], bool]


class Perform(Protocol):
    def __call__(self, call: Call[list[Any]], *, seq: int | None) -> list[Any]:
        """The answer to a step. `seq` is that of a DaemonTimeout before: it is done once."""
        ...


def must_succeed(_: object) -> None:
    """For calls that only a bug makes fail; the answer itself says nothing."""


class StepCalls:
    """An ordered list of calls. What gives back comes before what asks.

    Invariant: what kvd was asked and did not answer in time is asked again, under its old number,
    before anything else is; unless it is forgotten.
    """

    def __init__(self) -> None:
        self._calls: list[Asked] = []
        self._asked: list[Asked] = []  # by a `make` that has not come to its end
        self._answers: list[Any] = []  # to the first of them
        self._seq: int | None = None  # of the step that timed out

    def __len__(self) -> int:
        return len(self._calls) + len(self._asked)

    def add(self, call: Call[T], then: Callable[[T], None] = must_succeed) -> None:
        """`then` gets the result; an error is raised out of `make`."""
        self._calls.append((call, then, False))

    def ask(self, call: Call[T], then: Callable[[T | KvdError], None]) -> None:
        """`then` gets the result or the error: for what may be refused."""
        self._calls.append((call, then, True))

    def forget(self) -> None:
        """Drop all calls, asked or not: whoever added them adds what still matters anew."""
        self._calls, self._asked, self._answers, self._seq = [], [], [], None

    def make(self, perform: Perform) -> None:
        """Make all calls in one step (or several, if one cannot take them) and hand out the answers
        in order. Calls that an answer adds wait for the next time. Raises the first error of a
        call that had to succeed, after the others were handed out; DaemonUnreachable before any
        answer was: `make` again (DaemonTimeout), or `forget`."""
        if not self._asked:
            self._asked, self._calls = self._calls, []
        while len(self._answers) < len(self._asked):
            batch = self._asked[len(self._answers) :][:MAX_CALLS_A_STEP]
            self._answers += self._perform(perform, verbs.step([call for call, _, _ in batch]))
        asked, answers, self._asked, self._answers = self._asked, self._answers, [], []
        failed: KvdError | None = None
        for (_, then, may_fail), answer in zip(asked, answers, strict=True):
            if isinstance(answer, KvdError) and not may_fail:
                failed = failed or answer
            else:
                then(answer)
        if failed is not None:
            raise failed

    def _perform(self, perform: Perform, step: Call[list[Any]]) -> list[Any]:
        seq, self._seq = self._seq, None
        try:
            return perform(step, seq=seq)
        except DaemonTimeout as e:
            self._seq = e.details.get("seq")
            raise
        except DeadlineExceeded:  # it was taken up too late, and nothing was done
            return perform(step, seq=None)
