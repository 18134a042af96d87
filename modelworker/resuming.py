"""How a worker goes on with the next kvd: it says which pages it uses, and asks for all else anew.

What kvd had been asked when it died may have been done or not, so nothing of that is kept: pages
that were given in an answer that never came are not declared, and go free; what was to be freed is
not declared either, once it is published; what was to be published is published again, which is the
same if it was done before. Only block tables count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from modelworker.publishing import publish
from modelworker.scheduler import Scheduler
from modelworker.sequence import Sequence
from modelworker.step_calls import StepCalls

BEGUN_AT_ONCE = 4096  # kvd begins no more in one call
TIMEOUT_S = 2.0  # of a try; nothing is computed meanwhile


def resume(client: KvdClient, scheduler: Scheduler, calls: StepCalls) -> int:
    """Resume the session; `calls` then has all that kvd must be told before anything else. Returns
    how many sequences compute anew, as kvd refused some of their pages: there should be none.

    Raises DaemonUnreachable (try again: nothing has changed), PoolLost or SessionEnded.
    """
    holders = [*scheduler.running, *scheduler.left]
    holds = Counter(ref for sequence in holders for ref in sequence.refs)
    refs = np.fromiter(holds.keys(), np.int64, len(holds))
    counts = np.fromiter(holds.values(), np.int32, len(holds))
    refused: set[int] = set(client.resume(refs, counts, TIMEOUT_S).tolist())
    calls.forget()
    scheduler.forget_unanswered()
    robbed = [s for s in scheduler.running if not refused.isdisjoint(s.refs)]
    for sequence in robbed:
        scheduler.running.remove(sequence)
        scheduler.waiting.append(sequence)
        _free_the_rest(sequence, refused, calls)
    # It is no wonder that kvd refuses what it had been asked to free.
    for left in [s for s in scheduler.left if not refused.isdisjoint(s.refs)]:
        scheduler.left.remove(left)
        _free_the_rest(left, refused, calls)
    _begin_anew(scheduler, calls)
    return len(robbed)


def start_over(scheduler: Scheduler, requests: Iterable[list[Sequence]], now: float) -> None:
    """The pool is lost: what has not ended, request by request in order of age, begins from its
    tokens."""
    for sequences in (scheduler.running, scheduler.waiting, scheduler.left):
        sequences.clear()
    scheduler.beginning.clear()
    scheduler.forget_unanswered()
    for unfinished in requests:
        for sequence in unfinished:
            sequence.begin_anew()
        scheduler.beginning.add(list(unfinished), now)


def _free_the_rest(sequence: Sequence, refused: set[int], calls: StepCalls) -> None:
    kept = [ref for ref in sequence.back_to_waiting() if ref not in refused]
    if kept:
        calls.add(verbs.free(kept))


def _begin_anew(scheduler: Scheduler, calls: StepCalls) -> None:
    """kvd has forgotten all numbers: new ones, in the old order; and behind them what was left."""
    old = sorted([*scheduler.running, *scheduler.waiting], key=lambda s: s.age)
    for start in range(0, len(old), BEGUN_AT_ONCE):
        part = old[start : start + BEGUN_AT_ONCE]

        def begun(first: int, part: list[Sequence] = part) -> None:
            for number, sequence in enumerate(part, first):
                sequence.number = number
                if sequence in scheduler.running:
                    _run_on(sequence, scheduler, calls)

        calls.add(verbs.begin(len(part)), begun)
    for left in scheduler.left:
        _leave_again(left, scheduler, calls)


def _run_on(sequence: Sequence, scheduler: Scheduler, calls: StepCalls) -> None:
    """kvd counts a request as running once it has got pages under its number, and asks only those
    to yield: it forks its first page to itself."""
    first, page_size = sequence.refs[:1], scheduler.page_size
    calls.add(verbs.fork(first, page_size, 1, sequence.age))
    calls.add(verbs.free(first))
    if scheduler.limits.waits and sequence.publishes and sequence.num_uncomputed > 1:
        announce = verbs.announce(sequence.age, sequence.namespace, sequence.token_ids)
        calls.ask(announce, lambda _: None)
    publish(sequence, page_size, calls, after_restart=True)


def _leave_again(left: Sequence, scheduler: Scheduler, calls: StepCalls) -> None:
    def published() -> None:
        calls.add(verbs.free(left.refs), lambda _: scheduler.left.remove(left))

    publish(left, scheduler.page_size, calls, published, after_restart=True)
