"""What was accepted and is not finished, and how it becomes tokens."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
import torch

from kvd_shared.errors import KvdError, SessionEnded
from modelworker.attachment import Attachment
from modelworker.chunk import Chunk
from modelworker.detokenize import IncrementalText
from modelworker.engine_options import EngineOptions
from modelworker.pace import PrefillPace, StepPace
from modelworker.requests import (
    BadLogits,
    Delta,
    Emit,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
)
from modelworker.resuming import start_over
from modelworker.sampler import new_generator, sample
from modelworker.scheduler import Scheduler
from modelworker.sequence import Sequence
from modelworker.step_calls import StepCalls
from modelworker.tokenizer import Tokenizer

BAD_LOGITS = (
    "the model computed NaN or infinity for this prompt: are its weights whole, and is the pool's "
    "kv_dtype wide enough for it?"
)

log = structlog.get_logger()


class Work:
    """The requests, their sequences, and the calls that they make. All of the engine's thread.

    Invariant: `requests` are those that are not finished, in order of age, each with its sequences
    that are not; all of these are in the scheduler.
    """

    def __init__(self, tokenizer: Tokenizer, options: EngineOptions, page_size: int) -> None:
        self.requests: dict[str, list[Sequence]] = {}
        self.calls = StepCalls()
        self.computed_tokens = 0  # that went through the model, in all
        self._tokenizer = tokenizer
        self._options = options
        self._pace, self._step_pace = PrefillPace(), StepPace()
        self.begin_anew(page_size)

    def begin_anew(self, page_size: int) -> None:
        """In a pool that has nothing of ours: all begins from the tokens that there are."""
        self.calls.forget()
        self.scheduler = Scheduler(
            page_size,
            self._options.limits,
            lambda sequence, error: self.fail(sequence.request, error),
            self._pace,
            self._step_pace,
        )
        start_over(self.scheduler, self.requests.values(), time.monotonic())

    # --- in and out

    def add(self, request: GenerationRequest, emit: Emit) -> None:
        """It queues for its numbers."""
        sequences = self._sequences(request, emit)
        self.requests[request.request_id] = list(sequences)
        self.scheduler.beginning.add(sequences, time.monotonic())

    def cancel(self, request_id: str) -> None:
        """It gives its pages back, and is told nothing. Nothing if it is not there."""
        for sequence in self.requests.pop(request_id, []):
            self.scheduler.finish(sequence, self.calls)

    def fail(self, request: GenerationRequest, error: KvdError) -> None:
        """One request fails, others go on."""
        sequences = self.requests.pop(request.request_id)
        for sequence in sequences:
            self.scheduler.finish(sequence, self.calls)
        log.warning("request.failed", request=request.request_id, code=error.code)
        sequences[0].emit(Failed(error))

    def fail_where(self, error_of: Callable[[Sequence], KvdError | None]) -> None:
        """Fail the requests for whose first sequence there is an error."""
        for sequences in list(self.requests.values()):
            if (error := error_of(sequences[0])) is not None:
                self.fail(sequences[0].request, error)

    # --- tokens

    def compute(self, attached: Attachment) -> bool:
        """Compute what has the pages for it, and hand the tokens out. False: nothing does. See
        `run`."""
        chunks = self.scheduler.chunks()
        if chunks:
            self.run(attached, chunks)
        else:
            self._step_pace.pause()
        return bool(chunks)

    def run(self, attached: Attachment, chunks: list[Chunk]) -> None:
        """One pass of the model.

        Raises SessionEnded before anything comes of it where kvd may have given pages away that
        were read: a moment ago they were still ours, or this was seen.
        """
        began_s = time.monotonic()
        logits = attached.runner.run([chunk.for_runner() for chunk in chunks])
        if attached.client.fenced:  # seen before a random number is drawn for what is discarded
            raise SessionEnded("kvd has ended the session: the step is discarded")
        now = time.monotonic()
        self._note_pace(chunks, now - began_s)
        self._step_pace.note(now)
        self._hand_out(chunks, logits)

    def _hand_out(self, chunks: list[Chunk], logits: torch.Tensor) -> None:
        """Publish what is full; sample for the chunks that are complete."""
        tokens = self._sample(logits, [c.sequence for c in chunks if c.is_complete])
        for chunk in chunks:
            leader, is_complete = chunk.sequence, chunk.is_complete
            if leader.finished:  # with a sibling whose logits were bad
                continue
            followers = leader.followers
            if is_complete and not all(s in tokens for s in (leader, *followers)):
                self.fail(leader.request, BadLogits(BAD_LOGITS))
                continue
            self.scheduler.computed(chunk, self.calls)
            if not is_complete:
                continue
            for follower in followers:
                follower.cached_tokens = leader.cached_tokens
                self._append(follower, tokens[follower])
            if followers:
                self.scheduler.fork(leader, self.calls)  # before the leader may end
            self._append(leader, tokens[leader])

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
        self.computed_tokens += sum(chunk.num_tokens for chunk in chunks)
        prompts = [chunk for chunk in chunks if not chunk.sequence.is_decoding]
        self._pace.note(sum(chunk.num_tokens for chunk in prompts), seconds)

    def _append(self, sequence: Sequence, token: int) -> None:
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
            self._finished(sequence, reason)

    def _finished(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, self.calls)
        left = self.requests[sequence.request.request_id]
        left.remove(sequence)
        if not left:
            del self.requests[sequence.request.request_id]
        cached = sequence.cached_tokens or 0
        sequence.emit(Finished(sequence.index, reason, sequence.num_generated, cached))

    def _sequences(self, request: GenerationRequest, emit: Emit) -> list[Sequence]:
        space = self._options.namespace(request.salt)
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
