"""Which sequences compute which tokens in the next step, and what that asks of the cache.

No I/O: calls to kvd are collected in a StepCalls, and the clock is passed in. A step is

    scheduler.reserve(calls, now)      # pages for the running, admissions of the waiting
    calls.make(kvd)                    # one round trip
    runner.copy_pages(scheduler.take_copies())
    chunks = scheduler.chunks()        # who got what it needs computes
    ... run, sample ...
    scheduler.computed(chunk, calls)   # publish what filled
    scheduler.fork(leader, calls)      # once it has computed the prompt: for the others of its n
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

from kvd_shared import verbs
from kvd_shared.errors import KvdError, NoPages, OverLimit
from kvd_shared.refs import PageRefs
from kvd_shared.verbs import MatchResult
from modelworker.beginning import Beginning
from modelworker.chunk import Chunk
from modelworker.forks import ask_fork, hold_tail
from modelworker.leases import Leases
from modelworker.pace import PrefillPace, StepPace
from modelworker.publishing import publish
from modelworker.sequence import NEVER, Sequence
from modelworker.step_calls import StepCalls
from modelworker.waits import Waits

CANDIDATES = 16  # the oldest of the waiting: among them the longest cached prefix goes first
PROBE_AGAIN_S = 0.25
ADMISSIONS_A_STEP = 8
# Computing a prompt twice takes the machine from others, and paces are measured under changing
# load: it is worth it only if this worker looks so many times as fast.
MUCH_SOONER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one worker. After `patience_s` of waiting, age goes before cache hits. `waits`: for what
    another sequence, here or in another worker, is computing of the same prompt.
    `lease_ahead_s`: pages are leased for so much decoding without kvd."""

    max_batch_tokens: int = 512
    max_sequences: int = 32
    patience_s: float = 2.0
    waits: bool = True
    lease_ahead_s: float = 2.0


class Scheduler:
    """Invariants: a sequence that has not ended is in `beginning` (it has no number), `waiting` or
    `running`, in one of them; only running ones hold pages, and those in `left`: what sequences
    were that have given their pages back, until kvd has confirmed it. `refuse` is called with
    sequences that kvd will not admit ever; `pace` is what `computed` measures against that of
    others."""

    def __init__(
        self,
        page_size: int,
        limits: Limits,
        refuse: Callable[[Sequence, KvdError], None],
        pace: PrefillPace,
        step_pace: StepPace,
    ) -> None:
        self.page_size = page_size
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.left: list[Sequence] = []
        self.beginning = Beginning(self.waiting.append, refuse)
        self.waits = Waits()
        self.leases = Leases(page_size, limits.lease_ahead_s, step_pace)
        self._refuse = refuse
        self._pace = pace
        self._copies: list[tuple[int, int]] = []
        self._over_limit: OverLimit | None = None  # what a growing sequence was told

    # --- in and out

    def finish(self, sequence: Sequence, calls: StepCalls) -> None:
        """The sequence is over, complete or not: keep what it computed in the cache, give back
        the rest."""
        sequence.finished = True
        if sequence.number is None:
            self.beginning.drop(sequence)
            return
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence, calls)
        else:
            self.waiting.remove(sequence)
            self.waits.end(sequence)
        calls.add(verbs.end(sequence.age))

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

    def heard(self, kind: str, number: int, tokens: int, now: float) -> None:
        """kvd says to a sequence that waits for another's computing how that goes on: that its
        first `tokens` are cached now, and whether to ask for it again."""
        if self.waits.heard(kind, number, now):
            (sequence,) = (s for s in self.waiting if s.number == number)
            sequence.probed_tokens, sequence.probed_s = tokens, now

    def _give_back(self, sequence: Sequence, calls: StepCalls) -> None:
        publish(sequence, self.page_size, calls)
        left = copy(sequence)
        if refs := sequence.back_to_waiting():
            self.left.append(left)
            calls.add(verbs.free(refs), lambda _: self.left.remove(left))

    # --- kvd has started anew

    def forget_unanswered(self) -> None:
        """kvd's answers to what it was asked will not come, and it has forgotten who waits and who
        is refused. The pages are still held, and count as in use, leased ones too."""
        for sequence in (*self.running, *self.left):
            sequence.num_offered, sequence.num_leased = sequence.num_published, 0
        for sequence in self.waiting:
            sequence.refused = False
            if sequence.is_forking:
                sequence.leader = None  # it goes on by itself
        self.beginning.ask_again()
        self.waits.forget()
        self._copies.clear()
        self._over_limit = None

    # --- pages for the next step

    def reserve(self, calls: StepCalls, now: float) -> None:
        """Ask for the pages of the next step: first the running, by age, then new ones."""
        self.running.sort(key=lambda s: s.age)
        self.leases.use(self.running, calls)
        if self.leases.give_back(self.running, calls, now):
            self._over_limit = None
        if self._over_limit is not None:
            self._shrink(self._over_limit, calls)
        for sequence in self.running:
            missing = sequence.pages_missing(self.page_size)
            if missing:
                self._grow(sequence, missing, calls)
        self._admit(calls, now)
        self.leases.ask(self.running, calls, now)

    def _grow(self, sequence: Sequence, missing: int, calls: StepCalls) -> None:
        def granted(refs: PageRefs | KvdError) -> None:
            if isinstance(refs, NoPages | OverLimit):
                self.leases.short()
                if isinstance(refs, OverLimit):
                    self._over_limit = refs
                return  # it sits this step out; kvd knows that it wants them
            if isinstance(refs, KvdError):
                raise refs
            if sequence in self.running:
                sequence.refs.extend(refs.tolist())
            else:  # kvd was slow to answer, and it has ended
                calls.add(verbs.free(refs))

        calls.ask(verbs.allocate(missing, sequence.number), granted)

    def _shrink(self, error: OverLimit, calls: StepCalls) -> None:
        """The running ones together need more than this session may hold: the youngest yields, or
        fails if it is alone."""
        self._over_limit = None
        if len(self.running) > 1:
            self.preempt(self.running[-1].age, calls)
        elif self.running:
            self._refuse(self.running[0], error)

    def _admit(self, calls: StepCalls, now: float) -> None:
        room = min(self._room(), ADMISSIONS_A_STEP)
        tokens = self.limits.max_batch_tokens - sum(s.num_uncomputed for s in self.running)
        if room <= 0 or tokens <= 0:
            return
        may_start = (s for s in self.waiting if not s.leader and not self.waits.is_on(s, now))
        candidates = heapq.nsmallest(CANDIDATES, may_start, key=lambda s: s.age)
        if len(candidates) > 1:
            known = [s for s in candidates if s.probed_s > NEVER or not s.request.use_cache]
            self._probe(candidates, calls, now)
            candidates = known  # the others' turn is in the next step, which knows what they find
        for sequence in sorted(candidates, key=lambda s: self._turn(s, now))[:room]:
            if tokens <= 0:
                return
            self._acquire(sequence, calls, now)
            tokens -= max(1, sequence.num_tokens - sequence.probed_tokens)
            if sequence.refused:
                return  # it is tried again; those behind it could not pass it

    def _room(self) -> int:
        """How many more sequences may run."""
        forking = sum(s.is_forking for s in self.waiting)
        return self.limits.max_sequences - len(self.running) - forking

    def _turn(self, sequence: Sequence, now: float) -> tuple[int, int, int]:
        """Sort key of the waiting: those that kvd keeps pages for, that were preempted or that
        have lost patience, by age; then the longest cached prefix."""
        impatient = now - sequence.arrived_s > self.limits.patience_s
        if sequence.refused or sequence.num_generated or impatient:
            return 0, 0, sequence.age
        return 1, -sequence.probed_tokens, sequence.age

    def _probe(self, candidates: list[Sequence], calls: StepCalls, now: float) -> None:
        """Ask what the cache has for each, where it is not known or known too long."""
        stale = [s for s in candidates if s.request.use_cache and now - s.probed_s > PROBE_AGAIN_S]
        for sequence in stale:
            sequence.probed_s = now

            def found(tokens: int | KvdError, sequence: Sequence = sequence) -> None:
                if isinstance(tokens, OverLimit):
                    return  # it is refused when it is asked for
                if isinstance(tokens, KvdError):
                    raise tokens
                sequence.probed_tokens = tokens

            calls.ask(verbs.probe(sequence.namespace, sequence.token_ids), found)

    def _acquire(self, sequence: Sequence, calls: StepCalls, now: float) -> None:
        """Ask for a sequence's pages. Where another one is computing the same prompt and will be
        sooner, it waits for that instead and holds nothing."""

        def admitted(found: MatchResult | KvdError) -> None:
            if sequence.finished:  # its request failed by an answer in this very step
                if not isinstance(found, KvdError) and found.stop != "pending":
                    partial = [] if found.partial_ref is None else [found.partial_ref]
                    calls.add(verbs.free([*found.refs.tolist(), *partial]))
                return
            if isinstance(found, NoPages | OverLimit):
                self.leases.short()
            if isinstance(found, NoPages):
                sequence.refused = True
                return  # it waits on; kvd knows that it wants them
            if isinstance(found, OverLimit):
                if not self.running or found.details.get("limit") != "max_pages_a_session":
                    self._refuse(sequence, found)
                return  # it waits until some of the running have ended
            if isinstance(found, KvdError):
                raise found
            if found.stop == "pending":  # what kvd keeps for it since it was refused, it still does
                self.waits.begin(sequence, found, self._pace.tokens_per_s, now)
                return
            sequence.refused = False
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.refs = found.refs.tolist()
            sequence.num_computed = found.matched_tokens + found.partial_tokens
            sequence.num_published = sequence.num_offered = found.num_matched_pages
            if found.partial_ref is not None:
                self._copies.append((found.partial_ref, sequence.refs[found.num_matched_pages]))
                calls.add(verbs.free([found.partial_ref]))  # made after the copy
            if sequence.cached_tokens is None:
                sequence.cached_tokens = sequence.num_computed

        def granted(refs: PageRefs | KvdError) -> None:
            if isinstance(refs, KvdError):
                admitted(refs)
            else:
                admitted(MatchResult(refs, 0, 0, "not_cached"))

        pages = sequence.pages_missing(self.page_size)
        if not sequence.request.use_cache:
            calls.ask(verbs.allocate(pages, sequence.number), granted)
            return
        self.waits.end(sequence)
        may_wait = self.limits.waits and self.waits.may_begin(sequence)
        call = verbs.acquire(
            sequence.namespace,
            sequence.token_ids,
            pages,
            sequence.number,
            min_partial=self.page_size // 2,  # of less, computing costs less than a copy
            announce=self.limits.waits,
            own_rate=self._pace.tokens_per_s / MUCH_SOONER if may_wait else None,
        )
        calls.ask(call, admitted)

    def fork(self, leader: Sequence, calls: StepCalls) -> None:
        """The leader has computed the prompt, and its followers have their first tokens: they run
        on over its pages as far as there is room, and queue by themselves where there is not."""
        followers, leader.followers = [s for s in leader.followers if not s.finished], []
        room = max(0, self._room() + len(followers))  # they are counted as forking
        for follower in followers[room:]:
            follower.leader = None
        if followers[:room]:
            hold_tail(leader, self.page_size, calls)
        for follower in followers[:room]:
            self._fork(leader, follower, calls)

    def _fork(self, leader: Sequence, follower: Sequence, calls: StepCalls) -> None:
        num_computed = leader.num_computed

        def forked(refs: list[int] | None, copy: tuple[int, int] | None) -> None:
            follower.leader = None
            if refs is None:
                return  # it waits on, by itself
            if follower.finished:  # cancelled meanwhile
                calls.add(verbs.free(refs))
                return
            self.waiting.remove(follower)
            self.running.append(follower)
            follower.refs, follower.num_computed = refs, num_computed
            # A page that turned out to be a duplicate is not in the tree: it is published anew.
            shared = leader.refs[: leader.num_published]
            in_tree = len(shared) if shared and refs[: len(shared)] == shared else 0
            follower.num_published = follower.num_offered = in_tree
            follower.publishes = leader.publishes
            if copy is not None:
                self._copies.append(copy)

        ask_fork(leader, follower.age, self.page_size, calls, forked)

    def take_copies(self) -> list[tuple[int, int]]:
        """Page references (from, to) of pages to copy, after calls were made and before the next
        ones are: those let the sources go."""
        copies, self._copies = self._copies, []
        return copies

    # --- the step itself

    def chunks(self) -> list[Chunk]:
        """What to compute now: one token of every decoding sequence, then prompts by age, as far
        as the token budget goes. Sequences without the pages they need sit out."""
        budget = self.limits.max_batch_tokens
        ready = [s for s in self.running if not s.pages_missing(self.page_size)]
        ready.sort(key=lambda s: (not s.is_decoding, s.age))
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
        publish(chunk.sequence, self.page_size, calls)
