"""The step loop: takes requests in, keeps the batch full, hands tokens out.

One thread runs `run`; `submit`, `cancel`, `health` and `stop` may be called from any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

from kvd_shared.calls import Call
from kvd_shared.errors import (
    BadRequest,
    DaemonUnreachable,
    Draining,
    KvdError,
    PoolLost,
    SessionEnded,
)
from modelworker.attachment import Attach, Attachment
from modelworker.engine_options import EngineOptions
from modelworker.intake import Intake
from modelworker.outage import RETRY_S, Outage
from modelworker.requests import Emit, Failed, GenerationRequest, QueueFull, RequestTooLong
from modelworker.resuming import resume
from modelworker.sequence import Sequence
from modelworker.tokenizer import Tokenizer
from modelworker.work import Work

IDLE_WAIT_S = 0.5  # between looks at whether the daemon still lives
STARVED_WAIT_S = 0.003  # before asking again for pages that others have
CALL_TIMEOUT_S = 2.0  # a daemon that is silent for so long is treated as if it was away
ASK_AGAIN_S = 0.05  # for its answer, from then on
MOST_STRIKES = 3  # sessions that a request may lose to what looks like a bug

log = structlog.get_logger()


class WorkerEngine:
    """Invariant: every accepted request gets, for each of its n continuations, exactly one
    Finished, or one Failed for the whole, unless it is cancelled.

    What happens when kvd goes away:

        attached ──no answer──► alone ──resumed──► attached      same pages
            │                     │
            └─session or pool lost┴──► detached ──attached anew──► attached    all is recomputed

    Alone it computes what the pages that it has are enough for; nobody but it has them.
    """

    def __init__(
        self,
        attach: Attach,
        tokenizer: Tokenizer,
        options: EngineOptions,
        first: Attachment,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """`alive` is called again and again while all is well: at least every IDLE_WAIT_S, unless
        a step takes longer."""
        self._attach = attach
        self._options = options
        self._alive = alive
        self._intake = Intake()
        self._stopping = False
        self._stop_by = float("inf")
        self._outage = Outage(options.kvd_outage_s)
        self._is_alone = False
        self._attached: Attachment | None = first
        self._pool_tokens = first.pool_tokens
        self._work = Work(tokenizer, options, first.pool.layout.page_size)

    # --- any thread

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        """See modelworker.requests.Engine."""
        with self._intake.lock:
            self._check(request)
            self._intake.put(request, emit)
        self._intake.wake()

    def cancel(self, request_id: str) -> None:
        self._intake.cancel(request_id)

    def health(self) -> dict[str, object]:
        attached, away_s = self._attached, self._away_s()
        status = "ok" if not away_s else "away"
        if away_s > self._outage.limit_s:
            status = "detached"
        return {
            "status": "stopping" if self._stopping else status,
            "running": len(self._work.scheduler.running),
            "waiting": self._num_waiting(),
            "session": attached.client.session if attached else None,
            "computed_tokens": self._work.computed_tokens,
            "kvd_away_s": round(away_s, 3),
        }

    def stop(self) -> None:
        """Let what was accepted finish, as far as time allows, then return from `run`."""
        self._stop_by = time.monotonic() + self._options.drain_timeout_s
        self._stopping = True
        self._intake.wake()

    def _away_s(self) -> float:
        return self._outage.lasted(time.monotonic())

    def _num_waiting(self) -> int:
        scheduler = self._work.scheduler
        begun = len(scheduler.waiting) + scheduler.beginning.num_sequences
        return begun + self._intake.num_sequences

    def _check(self, request: GenerationRequest) -> None:
        if self._stopping:
            raise Draining("the worker is shutting down")
        if self._outage.is_long(time.monotonic()):
            raise self._too_long()
        self._options.namespace(request.salt)
        prompt, new = len(request.prompt_ids), request.params.max_tokens
        context, pool = self._options.context_len, self._pool_tokens
        if max(request.prompt_ids) >= self._options.vocab_size:
            raise BadRequest(
                f"token id {max(request.prompt_ids)} is not below the model's vocabulary of "
                f"{self._options.vocab_size}"
            )
        if prompt + new > min(context, pool):
            raise RequestTooLong(
                f"{prompt} prompt tokens and max_tokens {new} make {prompt + new}; the model's "
                f"context is {context} tokens and the pool holds {pool}: shorten the prompt or "
                "lower max_tokens",
                wanted=prompt + new,
                limit=min(context, pool),
            )
        waiting = self._num_waiting()
        if waiting and waiting + request.n > self._options.max_queued:
            raise QueueFull(
                f"{waiting} sequences wait already and {request.n} more are asked for; at most "
                f"{self._options.max_queued} may wait: retry later",
                waiting=waiting,
                limit=self._options.max_queued,
            )

    def _too_long(self) -> DaemonUnreachable:
        return DaemonUnreachable(
            f"kvd has been away for {self._away_s():.0f} s, longer than requests wait "
            f"(--kvd-outage-s {self._outage.limit_s:g}): retry when it is back"
        )

    # --- the engine's thread

    def run(self) -> None:
        """Serve until `stop`. Raises only what attaching again cannot mend: a pool that is no
        longer this model's."""
        try:
            while not self._stopping or self._has_work():
                self._intake.wait(self.turn())
        except BaseException:
            self._end(SessionEnded("the worker has failed"))
            raise
        self._end(Draining("the worker has stopped"))

    def _has_work(self) -> bool:
        work = self._work
        unfinished = self._intake or work.requests or (len(work.calls) and not self._is_alone)
        return bool(unfinished) and time.monotonic() < self._stop_by

    def turn(self) -> float:
        """One step, with kvd or without. Returns how long there is nothing to do, unless something
        comes in."""
        self._alive()
        arrived, cancelled = self._intake.take()
        for request, emit in arrived:
            self._work.add(request, emit)
        for request_id in cancelled:
            self._work.cancel(request_id)
        attached = self._attached or self._attach_anew()
        if attached is None:
            self._fail_overdue()
            return RETRY_S
        try:
            return self._step_alone(attached) if self._is_alone else self._step(attached)
        except KvdError as e:
            if not isinstance(e, DaemonUnreachable):
                self._lose_session(attached, e)
            elif attached.client.fenced:
                self._lose_session(attached, SessionEnded(f"kvd has ended it meanwhile: {e}"))
            else:
                self._go_on_alone(e)
            return 0.0

    def _step(self, attached: Attachment) -> float:
        scheduler, calls = self._work.scheduler, self._work.calls
        if not attached.client.alive:
            raise DaemonUnreachable("the daemon closed the session")
        now = time.monotonic()
        scheduler.beginning.ask(calls, now)
        if scheduler.beginning.is_asked:
            self._make_calls(attached)
        for notice in attached.client.notices():
            if notice.kind != "yield":
                scheduler.heard(notice.kind, notice.request, notice.tokens, now)
            elif scheduler.preempt(notice.request, calls):
                log.info("sequence.preempted", number=notice.request)
        scheduler.reserve(calls, now)
        self._make_calls(attached)
        self._outage.end()
        self._fail_overdue()
        if self._work.compute(attached) or len(calls):
            return 0.0
        return STARVED_WAIT_S if self._work.requests else IDLE_WAIT_S

    def _make_calls(self, attached: Attachment, timeout_s: float = CALL_TIMEOUT_S) -> None:
        def perform(call: Call[list[Any]], *, seq: int | None) -> list[Any]:
            return attached.client.call(call, timeout_s, seq=seq)

        self._work.calls.make(perform)
        # At once: what is copied from may be somebody else's after the next calls.
        attached.runner.copy_pages(self._work.scheduler.take_copies())

    # --- kvd goes away and comes back

    def _go_on_alone(self, error: KvdError) -> None:
        """kvd does not answer. The pages are still ours, whatever it did with the last calls."""
        self._is_alone = True
        if self._outage.begin(time.monotonic()):
            running = len(self._work.scheduler.running)
            log.warning("kvd.away", reason=error.message, running=running)

    def _step_alone(self, attached: Attachment) -> float:
        """Compute on in the pages that are there, and look whether kvd is back."""
        if self._outage.may_try(time.monotonic()) and self._is_back(attached):
            return 0.0
        self._fail_overdue()
        scheduler = self._work.scheduler
        scheduler.leases.use(scheduler.running, self._work.calls)  # heard if kvd was only slow
        return 0.0 if self._work.compute(attached) else RETRY_S

    def _is_back(self, attached: Attachment) -> bool:
        """Raises PoolLost or SessionEnded."""
        began_s, anew = time.monotonic(), 0
        try:
            if not attached.client.alive:
                anew = resume(attached.client, self._work.scheduler, self._work.calls)
                self._make_calls(attached)
            else:  # it has only been slow: what it was asked is still to be answered
                self._make_calls(attached, ASK_AGAIN_S)
        except DaemonUnreachable:
            return False
        self._is_alone = False
        log.info(
            "kvd.resumed",
            session=attached.client.session,
            away_s=round(self._away_s(), 3),
            resume_s=round(time.monotonic() - began_s, 3),
            running=len(self._work.scheduler.running),
            computed_anew=anew,
        )
        return True

    def _lose_session(self, attached: Attachment, error: KvdError) -> None:
        """Unmap the pool. All requests begin anew from the tokens that they have, but for those
        that have lost too many sessions to something that no restart explains."""
        self._outage.begin(time.monotonic())
        is_bug = not isinstance(error, DaemonUnreachable | Draining | PoolLost | SessionEnded)
        log.warning(
            "kvd.lost",
            code=error.code,
            reason=error.message,
            requests=len(self._work.requests),
            exc_info=is_bug,
        )
        self._attached, self._is_alone = None, False
        self._work.begin_anew(attached.pool.layout.page_size)
        attached.close()
        if is_bug:
            self._work.fail_where(lambda first: _strike(first, error))

    def _attach_anew(self) -> Attachment | None:
        """None: there is no daemon now. Raises what another try cannot mend."""
        if not self._outage.may_try(time.monotonic()):
            return None
        try:
            attached = self._attach()
        except KvdError as e:
            if not e.retryable:
                raise
            return None
        self._attached, self._pool_tokens = attached, attached.pool_tokens
        self._work.begin_anew(attached.pool.layout.page_size)
        self._work.fail_where(self._over_pool)
        log.info(
            "kvd.attached",
            session=attached.client.session,
            pool=attached.pool.name,
            away_s=round(self._away_s(), 3),
            begun_anew=len(self._work.requests),
        )
        return attached

    def _over_pool(self, first: Sequence) -> KvdError | None:
        wanted = len(first.request.prompt_ids) + first.request.params.max_tokens
        if wanted <= self._pool_tokens:
            return None
        return RequestTooLong(
            f"kvd has come back with a pool of {self._pool_tokens} tokens, and this may need "
            f"{wanted}: lower max_tokens",
            wanted=wanted,
            limit=self._pool_tokens,
        )

    def _fail_overdue(self) -> None:
        """Nobody waits for kvd longer than they may."""
        now = time.monotonic()
        if self._outage.is_long(now):
            self._work.fail_where(lambda _: self._too_long())
        for first in self._work.scheduler.beginning.overdue(now - self._outage.limit_s):
            self._work.fail(first.request, Draining("kvd has begun nothing new for too long"))

    def _end(self, error: KvdError) -> None:
        """Every request fails with the error, to be retried; then the pool is unmapped."""
        attached, self._attached = self._attached, None
        arrived, _ = self._intake.take()
        emits = [emit for _, emit in arrived]
        emits += [sequences[0].emit for sequences in self._work.requests.values()]
        self._work.requests.clear()
        for emit in emits:
            emit(Failed(error))
        if attached is not None:
            attached.close()  # after the answers: where the daemon hangs, it takes a second


def _strike(first: Sequence, error: KvdError) -> KvdError | None:
    """One strike more. What the request fails with, if it has had enough."""
    first.strikes += 1
    if first.strikes < MOST_STRIKES:
        return None
    return SessionEnded(f"the worker has lost {first.strikes} sessions: {error.message}")
