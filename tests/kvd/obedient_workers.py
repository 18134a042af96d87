"""Workers that keep the queue's rules, in rounds: each sequence computes one page a round.

A sequence that is asked to yield publishes its full pages, frees them all and queues again; while
it waits it holds nothing. Everything else is as unfriendly as chance makes it: the order in which
workers and sequences come, which prompts share pages, who gives up and who dies.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.session import Session
from kvd_shared.errors import NoPages
from kvd_shared.namespace import Namespace
from tests.kvd.tokens import PAGE_SIZE, packed, page_tokens, unpacked

MAIN = Namespace(model="m")
FUNERAL_ROUNDS = 3  # from a session's end to the proof of its process's death


@dataclass(eq=False)
class Sequence:
    """`letters` are the pages of tokens that it has in the end; the first `known` exist now."""

    letters: str
    known: int
    number: int = 0
    pages: list[int] = field(default_factory=list)
    num_yields: int = 0

    @property
    def tokens(self) -> bytes:
        return page_tokens(self.letters[: self.known])


class Worker:
    def __init__(self, host: Host, session: Session) -> None:
        self.host, self.session = host, session
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.notices: list[int] = []

    def add(self, sequence: Sequence) -> None:
        sequence.number = self.host.cache.begin(self.session, 1)
        self.waiting.append(sequence)

    def turn(self) -> None:
        heard, self.notices = self.notices, []
        for sequence in [s for s in self.running if s.number in heard]:
            self.give_back(sequence)
            self.host.cache.yielded(self.session, sequence.number)
            self.running.remove(sequence)
            self.waiting.append(sequence)
            sequence.num_yields += 1
        for sequence in self.host.shuffled(self.running):
            self.grow(sequence)
        for sequence in self.host.shuffled(self.waiting):
            self.start(sequence)

    def start(self, sequence: Sequence) -> None:
        try:
            found = self.host.cache.acquire(
                self.session, MAIN, sequence.tokens, sequence.known, sequence.number, self.host.now
            )
        except NoPages:
            return
        sequence.pages = unpacked(found.refs)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def grow(self, sequence: Sequence) -> None:
        if sequence.known == len(sequence.letters):
            self.finish(sequence)
            return
        try:
            new = self.host.cache.allocate(self.session, 1, sequence.number, self.host.now)
        except NoPages:
            return
        sequence.pages += unpacked(new)
        sequence.known += 1
        if self.host.rng.random() < 0.5:
            self.publish(sequence)

    def finish(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.give_back(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.host.cache.end(self.session, sequence.number)

    def give_back(self, sequence: Sequence) -> None:
        self.publish(sequence)
        self.host.cache.free(self.session, packed(sequence.pages), self.host.now)
        sequence.pages = []

    def publish(self, sequence: Sequence) -> None:
        sent = sequence.pages
        done = self.host.cache.publish(
            self.session, MAIN, sequence.tokens, packed(sent), None, self.host.now
        )
        sequence.pages = unpacked(done.refs)
        duplicates = [a for a, b in zip(sent, sequence.pages, strict=True) if a != b]
        self.host.cache.free(self.session, packed(duplicates), self.host.now)


class Host:
    """One pool, its workers, and the rounds they take."""

    def __init__(
        self, num_pages: int, num_workers: int, rng: random.Random, lost: float = 0.0
    ) -> None:
        self.cache = CacheManager(num_pages, PAGE_SIZE)
        self.rng = rng
        self.lost = lost  # share of notices that never arrive
        self.now = 0.0
        self.round = 0
        self.workers = [self.open() for _ in range(num_workers)]
        self.dying: list[tuple[int, Session]] = []

    def open(self) -> Worker:
        return Worker(
            self, self.cache.open_session(1 + self.rng.getrandbits(31), "worker", self.now)
        )

    def shuffled(self, sequences: list[Sequence]) -> list[Sequence]:
        return self.rng.sample(sequences, len(sequences))

    @property
    def unfinished(self) -> list[Sequence]:
        return [s for w in self.workers for s in w.waiting + w.running]

    def play_round(self) -> None:
        self.round += 1
        self.now += 1.0
        for worker in self.rng.sample(self.workers, len(self.workers)):
            worker.turn()
            self.pass_on()
        for due, session in [d for d in self.dying if d[0] <= self.round]:
            self.cache.release_session(session)
            while self.cache.sweep(self.now):
                check_cache(self.cache)
            self.dying.remove((due, session))
        check_cache(self.cache)

    def pass_on(self) -> None:
        """Deliver the notices; nobody who is the oldest of all that want or have pages gets one."""
        for kind, request, _ in self.cache.notices:
            assert kind == "yield"
            active = [r for r in self.cache.queue._requests.values() if r.running or r.demand]
            assert request not in active[:1], "the oldest was asked to yield"
            if self.rng.random() >= self.lost:
                for worker in self.workers:
                    if worker.session is request.session:
                        worker.notices.append(request.number)
        self.cache.notices.clear()

    def kill(self, worker: Worker) -> None:
        """Its sequences begin anew elsewhere, as the youngest; its pages come back later."""
        self.cache.end_session(worker.session)
        self.dying.append((self.round + FUNERAL_ROUNDS, worker.session))
        self.workers.remove(worker)
        self.workers.append(self.open())
        for sequence in worker.waiting + worker.running:
            sequence.pages = []
            self.rng.choice(self.workers).add(sequence)
