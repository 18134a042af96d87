"""Pages ahead of need, so that decoding goes on while kvd is away for a moment.

They are leased without a request number: such a caller comes after everybody who wants pages now,
so a lease makes nobody wait and nobody yield. When pages get short here they all go back.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences

from kvd_shared import verbs
from kvd_shared.errors import KvdError, NoPages, OverLimit
from kvd_shared.layout import pages_needed
from kvd_shared.refs import PageRefs
from modelworker.pace import StepPace
from modelworker.sequence import Sequence
from modelworker.step_calls import StepCalls

MOST_TOKENS = 512  # ahead, of one sequence
AGAIN_S = 1.0  # after pages were short


class Leases:
    """`ahead_s`: how long every running sequence is to go on without kvd; 0: no leases.

    Until a step was measured it is one page.
    """

    def __init__(self, page_size: int, ahead_s: float, pace: StepPace) -> None:
        self.page_size = page_size
        self._ahead_s = ahead_s
        self._pace = pace
        self._from_s = float("-inf")  # when to ask again
        self._are_wanted = False  # by a sequence that needs pages now

    def short(self) -> None:
        """A sequence did not get the pages that it needs."""
        self._are_wanted = True

    def use(self, running: Sequences[Sequence], calls: StepCalls) -> None:
        """Before a step: say which leased pages it may write."""
        for sequence in running:
            if reached := sequence.pages_reached(self.page_size):
                calls.add(verbs.use(reached))

    def give_back(self, running: Sequences[Sequence], calls: StepCalls, now: float) -> bool:
        """Where pages are short, give back what is not used. Returns whether there was any."""
        if not self._are_wanted:
            return False
        self._are_wanted, self._from_s = False, now + AGAIN_S
        ahead = [ref for sequence in running for ref in sequence.pages_ahead()]
        if ahead:
            calls.add(verbs.free(ahead))
        return bool(ahead)

    def ask(self, running: Sequences[Sequence], calls: StepCalls, now: float) -> None:
        """After what is needed now was asked for."""
        if not self._ahead_s or now < self._from_s:
            return
        for sequence in running:
            missing = self._wanted(sequence) - len(sequence.refs)
            if missing > 0 and not sequence.pages_missing(self.page_size):
                self._ask(sequence, missing, calls, now)

    def _wanted(self, sequence: Sequence) -> int:
        """Pages that it should have: no more than it can ever use."""
        step_s = self._pace.seconds
        ahead = self.page_size if not step_s else int(self._ahead_s / step_s) + 1
        ahead = min(max(ahead, self.page_size), MOST_TOKENS)
        request = sequence.request
        most = len(request.prompt_ids) + request.params.max_tokens - 1
        return pages_needed(min(sequence.num_tokens + ahead, most), self.page_size)

    def _ask(self, sequence: Sequence, missing: int, calls: StepCalls, now: float) -> None:
        def leased(answer: PageRefs | KvdError) -> None:
            if isinstance(answer, NoPages | OverLimit):
                self._from_s = now + AGAIN_S
            elif isinstance(answer, KvdError):
                raise answer
            elif sequence.refs:
                sequence.refs.extend(answer.tolist())
                sequence.num_leased += len(answer)
            else:  # it has ended or yielded meanwhile
                calls.add(verbs.free(answer))

        calls.ask(verbs.lease(missing), leased)
