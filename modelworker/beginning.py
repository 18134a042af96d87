"""Requests that kvd has not numbered yet: they are new, or kvd is away, or it has lost them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvd_shared import verbs
from kvd_shared.errors import Draining, KvdError
from modelworker.sequence import Sequence
from modelworker.step_calls import StepCalls

AGAIN_S = 0.1  # after a daemon that shuts down has refused to begin anything


@dataclass(slots=True)
class Unbegun:
    """The sequences of one request. `asked`: kvd's answer is awaited."""

    sequences: list[Sequence]
    since_s: float
    asked: bool = False


class Beginning:
    """Invariant: requests are begun in the order in which they came, so that numbers tell age."""

    def __init__(
        self, begun: Callable[[Sequence], None], refuse: Callable[[Sequence, KvdError], None]
    ) -> None:
        self._unbegun: list[Unbegun] = []
        self._begun = begun
        self._refuse = refuse
        self._from_s = float("-inf")  # when to ask again

    @property
    def num_sequences(self) -> int:
        return sum(len(each.sequences) for each in list(self._unbegun))

    @property
    def is_asked(self) -> bool:
        """Whether an answer is awaited."""
        return any(each.asked for each in self._unbegun)

    def add(self, sequences: list[Sequence], now: float) -> None:
        self._unbegun.append(Unbegun(sequences, now))

    def drop(self, sequence: Sequence) -> None:
        """It has ended before it had a number. Nothing if it had one."""
        for each in self._unbegun:
            if sequence in each.sequences:
                each.sequences = [s for s in each.sequences if s is not sequence]

    def clear(self) -> None:
        self._unbegun.clear()

    def ask_again(self) -> None:
        """What was asked is not answered any more."""
        for each in self._unbegun:
            each.asked = False

    def overdue(self, before_s: float) -> list[Sequence]:
        """The first of each request that has been here since before that."""
        return [u.sequences[0] for u in self._unbegun if u.since_s < before_s and u.sequences]

    def ask(self, calls: StepCalls, now: float) -> None:
        self._unbegun = [each for each in self._unbegun if each.sequences or each.asked]
        if now < self._from_s:
            return
        for each in self._unbegun:
            if not each.asked:
                self._ask(each, calls, now)

    def _ask(self, each: Unbegun, calls: StepCalls, now: float) -> None:
        asked = list(each.sequences)  # some may end before the answer

        def answered(first: int | KvdError) -> None:
            each.asked = False
            if isinstance(first, Draining):
                self._from_s = now + AGAIN_S
                return
            self._unbegun.remove(each)
            if isinstance(first, KvdError):
                if each.sequences:
                    self._refuse(each.sequences[0], first)
                return
            for number, sequence in enumerate(asked, first):
                sequence.number = number
                if sequence.finished:
                    calls.add(verbs.end(number))
                else:
                    self._begun(sequence)

        each.asked = True
        calls.ask(verbs.begin(len(asked)), answered)
