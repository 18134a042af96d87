"""Full pages enter the tree as they fill, so that others use them while the sequence goes on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvd_shared import verbs
from kvd_shared.errors import BadRequest, Detached, KvdError, StaleVersion
from kvd_shared.verbs import PublishResult
from modelworker.sequence import Sequence
from modelworker.step_calls import StepCalls


def publish(
    sequence: Sequence,
    page_size: int,
    calls: StepCalls,
    then: Callable[[], None] = lambda: None,
    *,
    after_restart: bool = False,
) -> None:
    """Publish the pages that have filled since the last time, then call `then`. Nothing is
    published while the answer to the last time is awaited, which may change what it goes behind;
    nor where it may not: the cache is not to be used, or what comes of these weights or behind a
    flush is not wanted any more.

    `after_restart`: kvd may have done this before, and forgotten why it refused it.
    """
    start, stop = sequence.num_offered, sequence.num_full_pages(page_size)
    if start >= stop or start > sequence.num_published or not sequence.publishes:
        then()
        return
    sent = sequence.refs[start:stop]
    after = sequence.refs[start - 1] if start else None
    tokens = sequence.token_ids[start * page_size : stop * page_size]
    sequence.num_offered = stop
    unwanted = (StaleVersion, Detached, BadRequest) if after_restart else (StaleVersion, Detached)

    def published(done: PublishResult | KvdError) -> None:
        here = sequence.refs[start:stop] == sent  # else it has ended and freed its own
        if isinstance(done, unwanted):
            sequence.publishes = False
            if here:
                sequence.num_offered = start
        elif isinstance(done, KvdError):
            raise done
        else:
            swap(done, here)
        then()

    def swap(done: PublishResult, here: bool) -> None:
        """Where another sequence was faster, use its pages and give ours back."""
        canonical = done.refs.tolist()
        if here:
            sequence.num_published = stop
        if canonical == sent:
            return
        differ = np.flatnonzero(done.refs != np.array(sent)).tolist()
        if here:
            sequence.refs[start:stop] = canonical
        calls.add(verbs.free([(sent if here else canonical)[i] for i in differ]))

    calls.ask(verbs.publish(sequence.namespace, tokens, sent, after), published)
