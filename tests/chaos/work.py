"""What a light worker computes: its sequences, and the one round trip of each step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from tests.chaos.content import PAGE_SIZE, Path, Universe
from tests.chaos.history import Counter, History, Kind
from tests.chaos.ledger import Ledger
from tests.chaos.sequence import Pages, Sequence
from tests.chaos.step_calls import Refused, StepCalls
from tests.chaos.tickets import Tickets

CALL_TIMEOUT_S = 20.0
MAX_GROWTH = 9  # tokens a step
MIN_PARTIAL = 4  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a worker of a run works. `pace_s` is the mean time of a step's computing."""

    socket_dir: str
    folder: str  # of the run's histories
    name: str
    seed: int
    universe: Universe
    sequences: int = 6  # at once
    pace_s: float = 0.002
    fork_share: float = 0.15
    hand_over_share: float = 0.15
    late_share: float = 0.25  # publish at their end, so forks share pages that are being written
    verify_share: float = 0.2  # of the steps look at all pages again
    daemon_stays: bool = True  # then pages of a session stay as they are until its process is dead

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Options:
        return cls(**(raw | {"universe": Universe(**raw["universe"])}))


class Work:
    """Invariant: between two steps every page of a sequence is in the ledger, and the ledger has no
    others but those that the next step frees. Who owns this has attached: `client`, `ledger` and
    `pages` are of the session."""

    client: KvdClient
    ledger: Ledger
    pages: Pages

    def __init__(self, options: Options, history: History, tickets: Tickets) -> None:
        self.options, self.universe = options, options.universe
        self.rng = random.Random(options.seed)
        self.history, self.tickets = history, tickets
        self.sequences: list[Sequence] = []
        self.later: list[int] = []  # pages that the next step frees
        self.ends: list[int] = []  # requests that it ends

    def step(self) -> None:
        """One round trip, one time of computing."""
        calls = StepCalls(self.history)
        self._give_back_later(calls)
        for sequence in list(self.sequences):
            self._give_back_parts(calls, sequence)
        for sequence in self.sequences:
            self._ask(calls, sequence)
        if len(self.sequences) < self.options.sequences:
            self._begin_one(calls)
        self.history.flush()
        calls.make(lambda call: self.client.call(call, CALL_TIMEOUT_S))
        self.history.count(Counter.STEPS)
        self.history.flush()
        self._compute()
        self.pages.look_at_fence()  # before anything of it is published or completed
        for notice in self.client.notices():
            for sequence in self.sequences:
                if notice.kind == "yield" and sequence.request == notice.request:
                    sequence.asked_to_yield = sequence.running

    # --- what goes back first

    def _give_back_later(self, calls: StepCalls) -> None:
        """What only the answers of the step before have told."""
        refs, self.later = self.later, []
        numbers, self.ends = self.ends, []
        for ref in refs:  # one by one: a page can be named twice, for two sequences
            self.ledger.letting_go([ref])
            calls.add(verbs.free([ref]))
        for number in numbers:
            calls.add(verbs.end(number))

    def _give_back_parts(self, calls: StepCalls, sequence: Sequence) -> None:
        if not sequence.running:
            return
        late = sequence.publishes_late and not (sequence.finished or sequence.asked_to_yield)
        if sequence.full_pages > sequence.published and not (sequence.detached or late):
            self._publish(calls, sequence)
        if sequence.asked_to_yield:
            sequence.asked_to_yield = sequence.running = False
            self._free(calls, sequence)
            calls.add(verbs.yielded(sequence.request))
            self.history.count(Counter.YIELDED)
        elif sequence.finished and sequence.fork_request is None:
            hands_over = sequence.hands_over and sequence.written % PAGE_SIZE
            if hands_over and sequence.swapping:
                return  # the block table is not settled
            self.pages.verify(sequence, "a completed request")
            self.history.count(Counter.REQUESTS)
            self.sequences.remove(sequence)
            if hands_over and not sequence.detached:
                self._hand_over(calls, sequence)
            else:
                self._free(calls, sequence)
            calls.add(verbs.end(sequence.request))

    def _publish(self, calls: StepCalls, sequence: Sequence) -> None:
        start, stop = sequence.published, sequence.full_pages
        tokens = self.pages.tokens(sequence)[start * PAGE_SIZE : stop * PAGE_SIZE]
        refs = sequence.refs[start:stop]
        after = sequence.refs[start - 1] if start else None
        self.ledger.sealing(refs)
        table, path = sequence.refs, sequence.path
        sequence.swapping = True

        def published(done: verbs.PublishResult | Refused) -> None:
            sequence.swapping = False
            if isinstance(done, Refused):  # flushed: computed to the end, and published no more
                sequence.detached = True
                self.ledger.not_sealed(ref for ref in refs if ref in self.ledger.holds)
                return
            canonical = done.refs.tolist()
            swapped = [(i, r) for i, r in enumerate(canonical) if r != refs[i]]
            self.ledger.took([ref for _, ref in swapped])
            self.history.note(Kind.KNOWN, [path.number], stop)
            if sequence.refs is table:  # not given back meanwhile
                sequence.confirmed = stop
                for i, ref in swapped:
                    self.later.append(refs[i])
                    sequence.refs[start + i] = ref
                return
            # what was freed in the same step went by its old names; these are held in addition
            self.later += [ref for _, ref in swapped]

        calls.ask(
            verbs.publish(self.universe.namespace(path), tokens, refs, after),
            published,
            may_be=("DETACHED", "STALE_VERSION"),
        )
        sequence.published = stop

    def _free(self, calls: StepCalls, sequence: Sequence) -> None:
        refs, sequence.refs = sequence.refs, []
        sequence.written = sequence.published = sequence.confirmed = 0
        sequence.tail_to_copy = False
        if refs:
            self.ledger.letting_go(refs)
            calls.add(verbs.free(refs))

    def _hand_over(self, calls: StepCalls, sequence: Sequence) -> None:
        refs, tail = sequence.refs, sequence.refs[-1]
        self.ledger.sealing([tail])
        calls.add(verbs.seal_tail(tail, sequence.written % PAGE_SIZE))
        self.ledger.letting_go(refs)
        path, tokens = sequence.path, sequence.written

        def handed(ticket: bytes | Refused) -> None:
            if isinstance(ticket, Refused):  # too many tickets
                self.ledger.took(refs)
                self.later.extend(refs)
            else:
                self.tickets.put(ticket, path, tokens)
                self.history.count(Counter.TAILS)

        calls.ask(verbs.hand_over(refs, ttl_s=2.0), handed, may_be=("OVER_LIMIT",))

    # --- what is asked for then

    def _ask(self, calls: StepCalls, sequence: Sequence) -> None:
        if not sequence.running:
            self._acquire(calls, sequence)
        elif sequence.tail_to_copy:
            self._copy_tail(calls, sequence)
        elif sequence.forks and sequence.written == self.universe.fork_at(sequence.path):
            if not sequence.swapping:
                self._fork(calls, sequence)
        else:
            self._grow(calls, sequence)

    def _acquire(self, calls: StepCalls, sequence: Sequence) -> None:
        tokens = self.pages.tokens(sequence)[: sequence.length]
        wanted = -(-sequence.length // PAGE_SIZE)

        def acquired(found: verbs.MatchResult | Refused) -> None:
            if isinstance(found, Refused):
                return
            sequence.refs = found.refs.tolist()
            sequence.running = True
            sequence.published = sequence.confirmed = found.num_matched_pages
            sequence.written = found.matched_tokens
            self.ledger.took(sequence.refs[: sequence.published])
            self.ledger.took_own(sequence.refs[sequence.published :])
            self.history.count(Counter.MATCHED_PAGES, sequence.published)
            self.pages.verify(sequence, "matched pages")
            if found.partial_ref is not None:
                start, count = sequence.written, found.partial_tokens
                self.ledger.took([found.partial_ref])
                self.pages.verify_partial(sequence, found.partial_ref, start, count)
                self.pages.copy(found.partial_ref, sequence.refs[sequence.published])
                sequence.written += count
                self.history.count(Counter.PARTIAL)
                self.later.append(found.partial_ref)

        calls.ask(
            verbs.acquire(
                self.universe.namespace(sequence.path),
                tokens,
                wanted,
                sequence.request,
                min_partial=MIN_PARTIAL,
            ),
            acquired,
            may_be=("NO_PAGES",),
        )

    def _grow(self, calls: StepCalls, sequence: Sequence) -> None:
        if sequence.written == sequence.length:  # else it still waits for pages
            grown = min(sequence.goal, sequence.length + self.rng.randint(1, MAX_GROWTH))
            if sequence.forks:
                grown = min(grown, self.universe.fork_at(sequence.path))
            sequence.length = grown
        if sequence.missing_pages:

            def allocated(refs: Any) -> None:
                if not isinstance(refs, Refused):
                    self.ledger.took_own(refs.tolist())
                    sequence.refs += refs.tolist()

            calls.ask(
                verbs.allocate(sequence.missing_pages, sequence.request),
                allocated,
                may_be=("NO_PAGES",),
            )

    def _fork(self, calls: StepCalls, sequence: Sequence) -> None:
        if sequence.fork_request is None:
            calls.add(verbs.begin(), lambda n: setattr(sequence, "fork_request", n))
            return
        number, at = sequence.fork_request, sequence.written
        sequence.fork_request, sequence.forks = None, False
        full = at // PAGE_SIZE

        def forked(refs: Any) -> None:
            path = Path(sequence.path.doc, sequence.path.suffix, 1)
            goal = len(self.universe.tokens(path))
            branch = Sequence(path, number, goal, length=at)
            self.sequences.append(branch)
            if isinstance(refs, Refused):
                return  # it computes its prompt by itself
            own = refs.tolist()
            self.ledger.took(sequence.refs[:full])
            self.ledger.took_own(own)
            for ref in own:
                self.pages.copy(sequence.refs[full], ref)
            branch.refs = sequence.refs[:full] + own
            branch.running, branch.written = True, at
            branch.published = branch.confirmed = sequence.confirmed
            branch.detached, branch.publishes_late = sequence.detached, sequence.publishes_late
            self.history.count(Counter.FORKS)

        calls.ask(verbs.fork(sequence.refs, at, 1, number), forked, may_be=("NO_PAGES",))

    def _copy_tail(self, calls: StepCalls, sequence: Sequence) -> None:
        """The pages came from another worker: its sealed tail is copied before it grows."""
        tail = sequence.refs[-1]

        def made(ref: Any) -> None:
            if not isinstance(ref, Refused):
                self.ledger.took_own([ref])
                self.pages.copy(tail, ref)
                sequence.refs[-1], sequence.tail_to_copy = ref, False
                self.later.append(tail)

        calls.ask(verbs.make_writable(tail, sequence.request), made, may_be=("NO_PAGES",))

    def _begin_one(self, calls: StepCalls) -> None:
        if (ticket := self.tickets.take()) is not None:
            self._take_over(calls, *ticket)
            return
        path = Path(
            self.rng.randrange(self.universe.documents), self.rng.randrange(self.universe.suffixes)
        )

        def begun(number: int) -> None:
            sequence = self._new_sequence(path, number)
            sequence.forks = self.rng.random() < self.options.fork_share
            self.sequences.append(sequence)

        calls.add(verbs.begin(), begun)

    def _new_sequence(self, path: Path, number: int) -> Sequence:
        """Some end on the way: then what they have published is continued by others."""
        longest, prompt = len(self.universe.tokens(path)), self.universe.prompt_length(path)
        goal = longest if self.rng.random() < 0.5 else self.rng.randint(prompt, longest)
        sequence = Sequence(path, number, goal, length=prompt)
        sequence.hands_over = self.rng.random() < self.options.hand_over_share
        sequence.publishes_late = self.rng.random() < self.options.late_share
        return sequence

    def _take_over(self, calls: StepCalls, ticket: bytes, path: Path, tokens: int) -> None:
        numbers: list[int] = []

        def taken(found: Any) -> None:
            if isinstance(found, Refused):  # it had expired: nothing but the number was used
                self.ends.append(numbers[0])
                return
            refs, tail_tokens = found
            sequence = self._new_sequence(path, numbers[0])
            sequence.refs = refs.tolist()
            self.ledger.took(sequence.refs)
            sequence.goal = max(sequence.goal, tokens)
            sequence.length = sequence.written = tokens
            sequence.published = sequence.confirmed = tokens // PAGE_SIZE
            sequence.running = sequence.tail_to_copy = True
            if tail_tokens != tokens % PAGE_SIZE:
                self.history.violation("a ticket's tail is another", tokens=tail_tokens)
            self.pages.verify(sequence, "a sequence taken over")
            self.sequences.append(sequence)
            self.history.count(Counter.TAKEN_OVER)

        calls.add(verbs.begin(), numbers.append)
        calls.ask(verbs.take_over(ticket), taken, may_be=("UNKNOWN_HANDLE",))

    # --- computing

    def _compute(self) -> None:
        """Half of the writing, a while, and the other half."""
        todo = list(self._to_write())
        for sequence, start, stop in todo:
            self.pages.write(sequence, start, (start + stop) // 2)
        time.sleep(self.rng.expovariate(1 / self.options.pace_s) if self.options.pace_s else 0)
        for sequence, start, stop in todo:
            self.pages.write(sequence, (start + stop) // 2, stop)
            sequence.written = stop
        if self.rng.random() < self.options.verify_share:
            for sequence in self.sequences:
                self.pages.verify(sequence, "pages held")

    def _to_write(self) -> Iterator[tuple[Sequence, int, int]]:
        for sequence in self.sequences:
            stop = min(sequence.length, len(sequence.refs) * PAGE_SIZE)
            if sequence.running and not sequence.tail_to_copy and stop > sequence.written:
                yield sequence, sequence.written, stop
