"""What a light worker does when the daemon is gone: it reads and writes on in the pages that it
has, and resumes its session with the next daemon, which it tells what it holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvd_shared import verbs
from kvd_shared.errors import DaemonUnreachable, KvdError, PoolLost, SessionEnded
from tests.chaos.content import PAGE_SIZE
from tests.chaos.history import Counter, Kind

if TYPE_CHECKING:
    from tests.chaos.light_worker import LightWorker

PAUSE_S = 0.01
TIMEOUT_S = 5.0


def resume(worker: LightWorker) -> bool:
    """False: there is nothing to resume, for the pool or the session is over. Raises Fenced."""
    if worker.client.alive:
        worker.history.violation("the daemon lives and does not answer")
        return False
    while not worker.ending:
        try:
            _resume(worker)
        except DaemonUnreachable:  # also one that died again meanwhile
            _go_on(worker)
        except (PoolLost, SessionEnded):
            return False
        except KvdError as e:
            worker.history.violation("resuming was refused", code=e.code, text=str(e))
            return False
        else:
            worker.history.count(Counter.RESUMED)
            worker.history.note(Kind.RESUMED, [0])
            worker.history.flush()
            return True
    return False


def _resume(worker: LightWorker) -> None:
    """All of its pages were given by replies that have come, so none of them may be refused.

    What was under way may have been done or not: what was to be published is published again.
    Requests are numbered anew.
    """
    holds = worker.ledger.holds
    refused = worker.client.resume(list(holds), list(holds.values()), TIMEOUT_S)
    for ref in refused.tolist():
        worker.history.violation("a held page was lost by a restart", ref=ref)
    if worker.sequences:
        first = worker.client.call(verbs.begin(len(worker.sequences)))
        for number, sequence in enumerate(worker.sequences, first):
            sequence.request = number
    for sequence in worker.sequences:
        sequence.published = sequence.confirmed
        sequence.swapping = sequence.asked_to_yield = False
        sequence.fork_request = None
    worker.ends.clear()  # requests of the daemon before


def _go_on(worker: LightWorker) -> None:
    """As a worker that decodes in its leased pages: nobody else may touch what it holds."""
    for sequence in worker.sequences:
        worker.pages.verify(sequence, "pages held without a daemon")
        for place, ref in enumerate(sequence.refs[: -(-sequence.written // PAGE_SIZE)]):
            if ref in worker.ledger.own:
                stop = min((place + 1) * PAGE_SIZE, sequence.written)
                worker.pages.write(sequence, place * PAGE_SIZE, stop)
    time.sleep(PAUSE_S)
