"""The step loop: takes requests in, keeps the batch full, hands tokens out.

One thread runs `run`; `submit`, `cancel`, `health` and `stop` may be called from any other.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import structlog
import torch

from kvd_shared.errors import (
    BadRequest,
    DaemonUnreachable,
    Draining,
    KvdError,
    SessionEnded,
)
from kvd_shared.namespace import Namespace
from modelworker.attachment import Attach, Attachment
from modelworker.detokenize import IncrementalText
from modelworker.pace import PrefillPace
from modelworker.requests import (
    BadLogits,
    Delta,
    Emit,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    QueueFull,
    RequestTooLong,
)
from modelworker.sampler import new_generator, sample
from modelworker.scheduler import Chunk, Limits, Scheduler
from modelworker.sequence import Sequence
from modelworker.step_calls import StepCalls
from modelworker.tokenizer import Tokenizer

IDLE_WAIT_S = 0.5  # between looks at whether the daemon still lives
STARVED_WAIT_S = 0.003  # before asking again for pages that others have
REATTACH_WAIT_S = 0.1
BAD_LOGITS = (
    "the model computed NaN or infinity for this prompt: are its weights whole, and is the pool's "
    "kv_dtype wide enough for it?"
)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """`max_queued`: sequences that may wait to be admitted; a request of more is refused, unless
    none waits."""

    model: str  # for the namespace: fingerprint, and the dtype that K and V are computed in
    context_len: int
    vocab_size: int  # the model's; a tokenizer may know more ids than the model has rows for
    limits: Limits
    drain_timeout_s: float = 30.0  # after `stop`, for what was accepted
    max_queued: int = 1024
    weights_version: int = 0


class WorkerEngine:
    """Invariant: every accepted request gets, for each of its n continuations, exactly one
    Finished, or one Failed for the whole, unless it is cancelled."""

    def __init__(
        self, attach: Attach, tokenizer: Tokenizer, options: EngineOptions, first: Attachment
    ) -> None:
        self._attach = attach
        self._tokenizer = tokenizer
        self._options = options
        # not an Event: `stop` is called from a signal handler, which may interrupt this very thread
        # inside the Event's lock; SimpleQueue.put is reentrant
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._lock = threading.Lock()  # guards the four that other threads touch
        self._inbox: deque[tuple[GenerationRequest, Emit]] = deque()
        self._cancelled: set[str] = set()
        self._stopping = False
        self._stop_by = float("inf")
        self._requests: dict[str, list[Sequence]] = {}  # what is not finished, by request
        self._pace = PrefillPace()
        self._computed_tokens = 0  # that went through the model, in all
        self._attached: Attachment | None = None
        self._scheduler: Scheduler | None = None
        self._calls = StepCalls()
        self._begin_session(first)

    # --- any thread

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        """See modelworker.requests.Engine."""
        with self._lock:
            self._check(request)
            self._inbox.append((request, emit))
        self._wake.put(None)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self._cancelled.add(request_id)
        self._wake.put(None)

    def health(self) -> dict[str, object]:
        scheduler, attached = self._scheduler, self._attached
        status = "stopping" if self._stopping else "ok" if attached else "detached"
        return {
            "status": status,
            "running": len(scheduler.running) if scheduler else 0,
            "waiting": (len(scheduler.waiting) if scheduler else 0) + len(self._inbox),
            "session": attached.client.session if attached else None,
            "computed_tokens": self._computed_tokens,
        }

    def stop(self) -> None:
        """Let what was accepted finish, as far as time allows, then return from `run`."""
        self._stop_by = time.monotonic() + self._options.drain_timeout_s
        self._stopping = True
        self._wake.put(None)

    def _check(self, request: GenerationRequest) -> None:
        attached, scheduler = self._attached, self._scheduler
        if self._stopping:
            raise Draining("the worker is shutting down")
        if attached is None or scheduler is None:
            raise DaemonUnreachable("the worker has no kvd daemon: retry when it is back")
        self._namespace(request)
        prompt, new = len(request.prompt_ids), request.params.max_tokens
        context, pool = self._options.context_len, attached.pool_tokens
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
        waiting = len(scheduler.waiting) + sum(queued.n for queued, _ in self._inbox)
        if waiting and waiting + request.n > self._options.max_queued:
            raise QueueFull(
                f"{waiting} sequences wait already and {request.n} more are asked for; at most "
                f"{self._options.max_queued} may wait: retry later",
                waiting=waiting,
                limit=self._options.max_queued,
            )

    # --- the engine's thread

    def run(self) -> None:
        """Serve until `stop`. Raises only what attaching again cannot mend: a pool that is no
        longer this model's."""
        try:
            while not self._stopping or self._has_work():
                if self._attached is None and not self._reattach():
                    self._wait(REATTACH_WAIT_S)
                    continue
                try:
                    self._wait(self.step())
                except KvdError as e:
                    log.warning("kvd.lost", code=e.code, reason=e.message, exc_info=not e.retryable)
                    # Whatever it was, it was nothing that the requests asked for.
                    self._lose_session(SessionEnded(f"the worker lost its session: {e.message}"))
        except BaseException:
            self._lose_session(SessionEnded("the worker has failed"))
            raise
        self._lose_session(Draining("the worker has stopped"))

    def _has_work(self) -> bool:
        unfinished = self._inbox or self._requests or len(self._calls)
        return bool(unfinished) and time.monotonic() < self._stop_by

    def _wait(self, seconds: float) -> None:
        with suppress(Empty):
            if seconds:
                self._wake.get(timeout=seconds)
            while True:
                self._wake.get_nowait()

    def step(self) -> float:
        """One step of `run`. Returns how long there is nothing to do, unless something comes in."""
        attached, scheduler, calls = self._attached, self._scheduler, self._calls
        assert attached is not None and scheduler is not None
        self._take_in(attached, scheduler)
        now = time.monotonic()
        for notice in attached.client.notices():
            if notice.kind != "yield":
                scheduler.heard(notice.kind, notice.request, notice.tokens, now)
            elif scheduler.preempt(notice.request, calls):
                log.info("sequence.preempted", number=notice.request)
        scheduler.reserve(calls, now)
        self._make_calls(attached, scheduler)
        chunks = scheduler.chunks()
        if not chunks:
            if not attached.client.alive:
                raise DaemonUnreachable("the daemon closed the session")
            if len(calls):
                return 0.0
            return STARVED_WAIT_S if self._requests else IDLE_WAIT_S
        self._compute(attached, scheduler, chunks)
        return 0.0

    def _make_calls(self, attached: Attachment, scheduler: Scheduler) -> None:
        self._calls.make(attached.client.call)
        # At once: what is copied from may be somebody else's after the next calls.
        attached.runner.copy_pages(scheduler.take_copies())

    def _take_in(self, attached: Attachment, scheduler: Scheduler) -> None:
        """New requests get their numbers; cancelled ones give their pages back."""
        with self._lock:
            arrived, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, set()
        for request, emit in arrived:
            if request.request_id in cancelled:
                continue
            sequences = self._sequences(request, emit)
            self._requests[request.request_id] = list(sequences)
            scheduler.add(sequences, self._calls)
        if arrived:
            self._make_calls(attached, scheduler)
        for request_id in cancelled:
            for sequence in self._requests.pop(request_id, []):
                scheduler.finish(sequence, self._calls)

    def _sequences(self, request: GenerationRequest, emit: Emit) -> list[Sequence]:
        space = self._namespace(request)
        sequences = [
            Sequence(
                request,
                index,
                space,
                IncrementalText(self._tokenizer, request.params.stop),
                new_generator(request.params.seed, index),
                emit,
                time.monotonic(),
            )
            for index in range(request.n)
        ]
        leader, followers = sequences[0], sequences[1:]
        leader.followers = list(followers)
        for follower in followers:
            follower.leader = leader
        return sequences

    def _namespace(self, request: GenerationRequest) -> Namespace:
        version = self._options.weights_version
        return Namespace(model=self._options.model, weights_version=version, salt=request.salt)

    def _compute(self, attached: Attachment, scheduler: Scheduler, chunks: list[Chunk]) -> None:
        """Run the chunks, sample for those that are complete, hand the tokens out."""
        began_s = time.monotonic()
        logits = attached.runner.run([chunk.for_runner() for chunk in chunks])
        self._note_pace(chunks, time.monotonic() - began_s)
        tokens = self._sample(logits, [c.sequence for c in chunks if c.is_complete])
        for chunk in chunks:
            leader, is_complete = chunk.sequence, chunk.is_complete
            if leader.finished:  # with a sibling whose logits were bad
                continue
            followers = leader.followers
            if is_complete and not all(s in tokens for s in (leader, *followers)):
                self._fail(scheduler, leader.request, BadLogits(BAD_LOGITS))
                continue
            scheduler.computed(chunk, self._calls)
            if not is_complete:
                continue
            for follower in followers:
                follower.cached_tokens = leader.cached_tokens
                self._append(scheduler, follower, tokens[follower])
            if followers:
                scheduler.fork(leader, self._calls)  # before the leader may end
            self._append(scheduler, leader, tokens[leader])

    def _sample(self, logits: torch.Tensor, complete: list[Sequence]) -> dict[Sequence, int]:
        """Each sequence's next token by its row of logits; followers, who have their leader's
        prompt, draw their first one from its row. None for those with unsound logits."""
        groups = [[leader, *leader.followers] for leader in complete]
        rows = [row for row, group in enumerate(groups) for _ in group]
        each = [sequence for group in groups for sequence in group]
        params = [sequence.request.params for sequence in each]
        sampled = sample(logits[rows], params, [sequence.generator for sequence in each])
        return {s: token for s, token in zip(each, sampled, strict=True) if token is not None}

    def _note_pace(self, chunks: list[Chunk], seconds: float) -> None:
        self._computed_tokens += sum(chunk.num_tokens for chunk in chunks)
        prompts = [chunk for chunk in chunks if not chunk.sequence.is_decoding]
        self._pace.note(sum(chunk.num_tokens for chunk in prompts), seconds)

    def _append(self, scheduler: Scheduler, sequence: Sequence, token: int) -> None:
        params = sequence.request.params
        sequence.token_ids.append(token)
        ended = token in self._tokenizer.eos_ids and not params.ignore_eos
        text = "" if ended else sequence.text.push([token])
        reason: FinishReason | None = None
        if ended or sequence.text.stopped:
            reason = "stop"
        elif sequence.num_generated >= params.max_tokens:
            reason = "length"
        if reason is not None and not sequence.text.stopped:
            text += sequence.text.flush()
        sequence.emit(Delta(sequence.index, text, (token,)))
        if reason is not None:
            self._finished(scheduler, sequence, reason)

    def _fail(self, scheduler: Scheduler, request: GenerationRequest, error: KvdError) -> None:
        """One request fails, others go on."""
        sequences = self._requests.pop(request.request_id)
        for sequence in sequences:
            if sequence.number is not None:
                scheduler.finish(sequence, self._calls)
        log.warning("request.failed", request=request.request_id, code=error.code)
        sequences[0].emit(Failed(error))

    def _finished(self, scheduler: Scheduler, sequence: Sequence, reason: FinishReason) -> None:
        scheduler.finish(sequence, self._calls)
        left = self._requests[sequence.request.request_id]
        left.remove(sequence)
        if not left:
            del self._requests[sequence.request.request_id]
        cached = sequence.cached_tokens or 0
        sequence.emit(Finished(sequence.index, reason, sequence.num_generated, cached))

    # --- the daemon comes and goes

    def _reattach(self) -> bool:
        try:
            attached = self._attach()
        except KvdError as e:
            if not e.retryable:
                raise
            return False
        self._begin_session(attached)
        return True

    def _begin_session(self, attached: Attachment) -> None:
        self._scheduler = Scheduler(
            attached.pool.layout.page_size, self._options.limits, self._refused, self._pace
        )
        self._attached = attached
        log.info("kvd.attached", session=attached.client.session, pool=attached.pool.name)

    def _refused(self, sequence: Sequence, error: KvdError) -> None:
        assert self._scheduler is not None
        self._fail(self._scheduler, sequence.request, error)

    def _lose_session(self, error: KvdError) -> None:
        """Every request fails with the error, to be retried; then the pool is unmapped."""
        attached, self._attached, self._scheduler = self._attached, None, None
        self._calls = StepCalls()
        with self._lock:
            arrived, self._inbox = self._inbox, deque()
            self._cancelled.clear()
        emits = [emit for _, emit in arrived]
        emits += [sequences[0].emit for sequences in self._requests.values()]
        self._requests.clear()
        for emit in emits:
            emit(Failed(error))
        if attached is not None:
            attached.close()  # after the answers: where the daemon hangs, it takes a second
