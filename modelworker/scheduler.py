"""Which sequences compute which tokens in the next step, and what that asks of the cache.

No I/O: calls to kvd are collected in a StepCalls, and the clock is passed in. A step is

    scheduler.reserve(calls, now)      # pages for the running, admissions of the waiting
    calls.make(kvd)                    # one round trip
    chunks = scheduler.chunks()        # who got what it needs computes
    ... run, sample ...
    scheduler.computed(chunk, calls)   # publish what filled
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvd_shared import verbs
from kvd_shared.errors import KvdError, NoPages
from kvd_shared.refs import PageRefs, page_ids
from kvd_shared.verbs import MatchResult, PublishResult
from modelworker.runner import SequenceChunk
from modelworker.sequence import NEVER, Sequence
from modelworker.step_calls import StepCalls

CANDIDATES = 16  # the oldest of the waiting: among them the longest cached prefix goes first
PROBE_AGAIN_S = 0.25
ADMISSIONS_A_STEP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one worker. After `patience_s` of waiting, age goes before cache hits."""

    max_batch_tokens: int = 512
    max_sequences: int = 32
    patience_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_complete(self) -> bool:
        """Its last token is the sequence's newest: the logits give the next one."""
        return self.num_tokens == self.sequence.num_uncomputed

    def for_runner(self) -> SequenceChunk:
        """The chunk as the model computes it; its last token's logits give the next token."""
        s = self.sequence
        return SequenceChunk(
            s.token_ids[s.num_computed : s.num_computed + self.num_tokens],
            s.num_computed,
            page_ids(np.array(s.refs, dtype=np.int64)),
            self.is_complete,
        )


class Scheduler:
    """Invariants: a sequence is in `waiting` or `running`, not in both; only running ones hold
    pages. `refuse` is called with sequences that kvd will not admit ever."""

    def __init__(
        self, page_size: int, limits: Limits, refuse: Callable[[Sequence, KvdError], None]
    ) -> None:
        self.page_size = page_size
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._refuse = refuse

    # --- in and out

    def add(self, sequences: list[Sequence], calls: StepCalls) -> None:
        """Queue the sequences of one request; kvd numbers them by age."""

        def begun(first: int | KvdError) -> None:
            if isinstance(first, KvdError):
                self._refuse(sequences[0], first)
                return
            for i, sequence in enumerate(sequences):
                sequence.number = first + i
            self.waiting.extend(sequences)

        calls.ask(verbs.begin(len(sequences)), begun)

    def finish(self, sequence: Sequence, calls: StepCalls) -> None:
        """The sequence is over, complete or not: keep what it computed in the cache, give back
        the rest."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence, calls)
        else:
            self.waiting.remove(sequence)
        assert sequence.number is not None
        calls.add(verbs.end(sequence.number))
        sequence.finished = True

    def preempt(self, number: int, calls: StepCalls) -> Sequence | None:
        """kvd asks a sequence to yield to an older one: publish, free, queue again."""
        for sequence in self.running:
            if sequence.number == number:
                self.running.remove(sequence)
                self._give_back(sequence, calls)
                calls.add(verbs.yielded(number))
                self.waiting.append(sequence)
                return sequence
        return None  # it has just ended, and its end is on the way

    def _give_back(self, sequence: Sequence, calls: StepCalls) -> None:
        self._publish(sequence, calls)
        refs = sequence.back_to_waiting()
        if refs:
            calls.add(verbs.free(refs))

    # --- pages for the next step

    def reserve(self, calls: StepCalls, now: float) -> None:
        """Ask for the pages of the next step: first the running, by age, then new ones."""
        self.running.sort(key=_age)
        for sequence in self.running:
            missing = sequence.pages_missing(self.page_size)
            if missing:
                self._grow(sequence, missing, calls)
        self._admit(calls, now)

    def _grow(self, sequence: Sequence, missing: int, calls: StepCalls) -> None:
        def granted(refs: PageRefs | KvdError) -> None:
            if isinstance(refs, NoPages):
                return  # it sits this step out; kvd knows that it wants them
            if isinstance(refs, KvdError):
                raise refs
            sequence.refs.extend(refs.tolist())

        calls.ask(verbs.allocate(missing, sequence.number), granted)

    def _admit(self, calls: StepCalls, now: float) -> None:
        room = min(self.limits.max_sequences - len(self.running), ADMISSIONS_A_STEP)
        tokens = self.limits.max_batch_tokens - sum(s.num_uncomputed for s in self.running)
        if room <= 0 or tokens <= 0:
            return
        candidates = heapq.nsmallest(CANDIDATES, (s for s in self.waiting if s.may_start), key=_age)
        if len(candidates) > 1:
            known = [s for s in candidates if s.probed_s > NEVER or not s.request.use_cache]
            self._probe(candidates, calls, now)
            candidates = known  # the others' turn is in the next step, which knows what they find
        for sequence in sorted(candidates, key=lambda s: self._turn(s, now))[:room]:
            if tokens <= 0:
                return
            self._acquire(sequence, calls)
            tokens -= max(1, sequence.num_tokens - sequence.probed_tokens)
            if sequence.refused:
                return  # it is tried again; those behind it could not pass it

    def _turn(self, sequence: Sequence, now: float) -> tuple[int, int, int]:
        """Sort key of the waiting: those that kvd keeps pages for, that were preempted or that
        have lost patience, by age; then the longest cached prefix."""
        assert sequence.number is not None
        impatient = now - sequence.arrived_s > self.limits.patience_s
        if sequence.refused or sequence.num_generated or impatient:
            return 0, 0, sequence.number
        return 1, -sequence.probed_tokens, sequence.number

    def _probe(self, candidates: list[Sequence], calls: StepCalls, now: float) -> None:
        """Ask what the cache has for each, where it is not known or known too long."""
        stale = [s for s in candidates if s.request.use_cache and now - s.probed_s > PROBE_AGAIN_S]
        for sequence in stale:
            sequence.probed_s = now

            def found(tokens: int, sequence: Sequence = sequence) -> None:
                sequence.probed_tokens = tokens

            calls.add(verbs.probe(sequence.namespace, sequence.token_ids), found)

    def _acquire(self, sequence: Sequence, calls: StepCalls) -> None:
        def admitted(found: MatchResult | KvdError) -> None:
            sequence.refused = isinstance(found, NoPages)
            if isinstance(found, NoPages):
                return  # it waits on; kvd knows that it wants them
            if isinstance(found, KvdError):
                raise found
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.refs = found.refs.tolist()
            sequence.num_computed = found.matched_tokens
            sequence.num_published = found.num_matched_pages
            if sequence.cached_tokens is None:
                sequence.cached_tokens = found.matched_tokens

        def granted(refs: PageRefs | KvdError) -> None:
            if isinstance(refs, KvdError):
                admitted(refs)
            else:
                admitted(MatchResult(refs, 0, 0, "not_cached"))

        pages = sequence.pages_missing(self.page_size)
        if sequence.request.use_cache:
            call = verbs.acquire(sequence.namespace, sequence.token_ids, pages, sequence.number)
            calls.ask(call, admitted)
        else:
            calls.ask(verbs.allocate(pages, sequence.number), granted)

    # --- the step itself

    def chunks(self) -> list[Chunk]:
        """What to compute now: one token of every decoding sequence, then prompts by age, as far
        as the token budget goes. Sequences without the pages they need sit out."""
        budget = self.limits.max_batch_tokens
        ready = [s for s in self.running if not s.pages_missing(self.page_size)]
        ready.sort(key=lambda s: (not s.is_decoding, _age(s)))
        chunks: list[Chunk] = []
        for sequence in ready:
            if budget <= 0:
                break
            chunks.append(Chunk(sequence, min(sequence.num_uncomputed, budget)))
            budget -= chunks[-1].num_tokens
        return chunks

    def computed(self, chunk: Chunk, calls: StepCalls) -> None:
        """The chunk's K and V are in the pages."""
        chunk.sequence.num_computed += chunk.num_tokens
        self._publish(chunk.sequence, calls)

    def _publish(self, sequence: Sequence, calls: StepCalls) -> None:
        """Full pages enter the tree as they fill, so that others use them while this goes on."""
        start, stop = sequence.num_published, sequence.num_full_pages(self.page_size)
        if start >= stop or not sequence.request.use_cache:
            return
        sent = sequence.refs[start:stop]
        after = sequence.refs[start - 1] if start else None
        tokens = sequence.token_ids[start * self.page_size : stop * self.page_size]
        sequence.num_published = stop

        def published(done: PublishResult) -> None:
            """Where another worker was faster, use its pages and give ours back."""
            canonical = done.refs.tolist()
            if canonical == sent:
                return
            here = sequence.refs[start:stop] == sent  # else it has ended and freed its own
            differ = np.flatnonzero(done.refs != np.array(sent)).tolist()
            if here:
                sequence.refs[start:stop] = canonical
            calls.add(verbs.free([(sent if here else canonical)[i] for i in differ]))

        calls.add(verbs.publish(sequence.namespace, tokens, sent, after), published)


def _age(sequence: Sequence) -> int:
    assert sequence.number is not None
    return sequence.number
