"""Full pages enter the tree as they fill, so that others use them while the sequence goes on."""

from __future__ import annotations

import numpy as np

from kvd_shared import verbs
from kvd_shared.errors import Detached, KvdError, StaleVersion
from kvd_shared.verbs import PublishResult
from modelworker.sequence import Sequence
from modelworker.step_calls import StepCalls


def publish(sequence: Sequence, page_size: int, calls: StepCalls) -> None:
    """Publish the pages that have filled since the last time. Nothing where it may not: the cache
    is not to be used, or what comes of these weights or behind a flush is not wanted any more."""
    start, stop = sequence.num_published, sequence.num_full_pages(page_size)
    if start >= stop or not sequence.publishes:
        return
    sent = sequence.refs[start:stop]
    after = sequence.refs[start - 1] if start else None
    tokens = sequence.token_ids[start * page_size : stop * page_size]
    sequence.num_published = stop

    def published(done: PublishResult | KvdError) -> None:
        here = sequence.refs[start:stop] == sent  # else it has ended and freed its own
        if isinstance(done, StaleVersion | Detached):
            sequence.publishes = False
            if here:
                sequence.num_published = start
            return
        if isinstance(done, KvdError):
            raise done
        # Where another sequence was faster, use its pages and give ours back.
        canonical = done.refs.tolist()
        if canonical == sent:
            return
        differ = np.flatnonzero(done.refs != np.array(sent)).tolist()
        if here:
            sequence.refs[start:stop] = canonical
        calls.add(verbs.free([(sent if here else canonical)[i] for i in differ]))

    calls.ask(verbs.publish(sequence.namespace, tokens, sent, after), published)
