"""Sequences that wait until another one, in this worker or in another, has computed their prompt.

kvd says by notices how that goes on (docs/protocol.md). A notice can be lost, and the other one can
hang, so every wait ends by itself as well: then kvd is asked again, and after two waits without
any progress the sequence computes its prompt by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvd_shared.verbs import MatchResult
from modelworker.sequence import Sequence

MIN_PATIENCE_S = 0.25
MAX_PATIENCE_S = 5.0
MAX_FUTILE = 2  # waits in a row without progress


@dataclass(slots=True)
class Wait:
    """`until_s`: when to ask again, unless a notice comes. `progressed`: more of it is cached."""

    until_s: float
    patience_s: float
    progressed: bool = False


class Waits:
    """Invariant: what waits here is in the scheduler's `waiting` and holds nothing."""

    def __init__(self) -> None:
        self._waits: dict[int, Wait] = {}  # by request number

    def is_on(self, sequence: Sequence, now: float) -> bool:
        """Whether it is too early to ask for this sequence again."""
        wait = self._waits.get(sequence.age)
        return wait is not None and now < wait.until_s

    def may_begin(self, sequence: Sequence) -> bool:
        return sequence.futile_waits < MAX_FUTILE

    def begin(self, sequence: Sequence, found: MatchResult, own_rate: float, now: float) -> None:
        """kvd answered `found`: pending. Its patience is twice what that should take or, where the
        other one has shown no pace yet, would take here at `own_rate` tokens/s."""
        expected_s = found.pending_s
        if expected_s is None:
            expected_s = (found.pending_tokens - found.matched_tokens) / own_rate
        patience_s = min(max(MIN_PATIENCE_S, 2 * expected_s), MAX_PATIENCE_S)
        self._waits[sequence.age] = Wait(now + patience_s, patience_s)

    def heard(self, kind: str, number: int, now: float) -> bool:
        """kvd says `progress`, `ready` or `ended` to a request; False if it does not wait."""
        wait = self._waits.get(number)
        if wait is None:
            return False
        wait.progressed |= kind != "ended"
        wait.until_s = now + wait.patience_s if kind == "progress" else now
        return True

    def end(self, sequence: Sequence) -> None:
        """It is asked for again, or is over. Nothing if it does not wait."""
        wait = self._waits.pop(sequence.age, None)
        if wait is not None:
            sequence.futile_waits = 0 if wait.progressed else sequence.futile_waits + 1

    def forget(self) -> None:
        """kvd knows of no waits any more: everybody is asked for again."""
        self._waits.clear()
