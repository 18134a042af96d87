"""The others of a request begin where their leader has computed the prompt: nothing is computed
twice, full pages are shared, and of the last page each has a copy to go on in."""

from __future__ import annotations

from collections.abc import Callable

from kvd_shared import verbs
from kvd_shared.errors import KvdError, NoPages, OverLimit
from kvd_shared.layout import pages_needed
from kvd_shared.refs import PageRefs
from modelworker.sequence import Sequence
from modelworker.step_calls import StepCalls

# The new sequence's pages, None if they are not to be had now, and what to copy: (from, to), page
# references, before the next calls are made.
Forked = Callable[[list[int] | None, tuple[int, int] | None], None]


def hold_tail(leader: Sequence, page_size: int, calls: StepCalls) -> None:
    """Hold the leader's last page until forks of it, asked for in the same step, are copied: the
    leader may end in that very step."""
    num_tokens = leader.num_computed
    tail = leader.refs[num_tokens // page_size : pages_needed(num_tokens, page_size)]
    if tail:
        calls.add(verbs.share(tail), lambda _: calls.add(verbs.free(tail)))


def ask_fork(leader: Sequence, number: int, page_size: int, calls: StepCalls, then: Forked) -> None:
    """Ask for the pages of one more sequence with all tokens that the leader has computed, and room
    for one more. `number` is the new sequence's own: kvd counts it as running from then on."""
    num_tokens = leader.num_computed
    refs = leader.refs[: pages_needed(num_tokens, page_size)]
    full, tail = refs[: num_tokens // page_size], refs[num_tokens // page_size :]
    own: list[int] = []

    def allocated(answer: PageRefs | KvdError) -> None:
        if not isinstance(answer, KvdError):
            own.extend(answer.tolist())
        elif not isinstance(answer, NoPages | OverLimit):
            raise answer

    def forked(answer: PageRefs | KvdError) -> None:
        if isinstance(answer, NoPages | OverLimit):
            then(None, None)
            return
        if isinstance(answer, KvdError):
            raise answer
        if tail:
            (copy,) = answer.tolist()
            then([*full, copy], (tail[0], copy))
        elif own:
            then([*full, *own], None)
        else:  # no page to go on in: it is not running after all, unless it has ended meanwhile
            calls.add(verbs.free(full))
            calls.ask(verbs.yielded(number), lambda _: None)
            then(None, None)

    if not tail:
        calls.ask(verbs.allocate(1, number), allocated)
    calls.ask(verbs.fork(refs, num_tokens, 1, number), forked)
