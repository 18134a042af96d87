"""Workers, operators and time at random: mostly what workers do, now and then what they must not.

A run is a list of (operation, seed): each operation makes its choices from its own seed, so any of
them can be left out and the rest still means something. That is what makes a failure short.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from kvd.retention import NO_WISH
from kvd_shared.namespace import Namespace
from kvd_shared.refs import GENERATION, TOKEN_BYTES
from tests.kvd.random_world import PAGE_BYTES, PAGE_SIZE, RandomWorld, Row

Step = tuple[str, int]


class RandomWorkers(RandomWorld):
    def play(self, step: Step) -> None:
        name, seed = step
        self.rng = random.Random(seed)
        if self.rng.random() < 0.6:
            self.pair.now += self.rng.choice([0.25, 0.5, 1.0])
        OPERATIONS[name](self)

    # --- what workers do

    def start(self) -> None:
        session = self.session()
        number = None
        if self.rng.random() < 0.7:
            answer, number = self.pair.begin(session, 1)
            if answer != "ok":
                return
        namespace, tokens = self.wanted()
        row = Row(session, namespace, number, tokens)
        self.rows.append(row)
        self.acquire(row)

    def acquire(self, row: Row) -> None:
        """As many pages as the prompt has, or fewer."""
        need = -(-len(row.tokens) // PAGE_BYTES)
        count = self.rng.choice([1, need, need, need, need + 1])
        known = row.number is not None and not self.is_running(row.number)
        answer, found = self.pair.acquire(
            row.session,
            row.namespace,
            row.tokens,
            count,
            row.number,
            self.least(),
            row.number is not None and self.rng.random() < 0.5,
            self.rng.choice([None, 0.5, 4.0]) if known else None,
        )
        if answer == "ok" and found[2] != "pending":
            _, row.pages, _, (partial, _), _, new = found
            row.published = len(row.pages) - len(new)
            if partial is not None:
                self.partial.append((row.session, partial))

    def is_running(self, number: int) -> bool:
        return any(r.number == number and r.running for r in self.pair.model.queue.requests)

    def grow(self) -> None:
        row = self.row()
        if row and not row.pages:
            self.acquire(row)
        elif row:
            answer, pages = self.pair.allocate(row.session, self.rng.randint(1, 2), row.number)
            if answer == "ok":
                row.pages += pages
                row.tokens += self.prompt()

    def publish(self) -> None:
        row = self.row()
        if not row:
            return
        full = min(len(row.tokens) // PAGE_BYTES, len(row.pages))
        start = self.rng.choice([0, row.published])
        if start >= full:
            return
        stop = self.rng.choice([full, full, self.rng.randint(start + 1, full)])
        sent = row.pages[start:stop]
        after = row.pages[start - 1] if start else None
        tokens = row.tokens[start * PAGE_BYTES : stop * PAGE_BYTES]
        answer, canonical = self.pair.publish(
            row.session, row.namespace, tokens, sent, after, self.wish()
        )
        if answer == "ok":
            row.published = max(stop, row.published)
            row.pages[start:stop] = canonical
            duplicates = [ref for ref in sent if ref not in canonical]
            if duplicates and self.rng.random() < 0.9:
                self.pair.free(row.session, duplicates)

    def finish(self) -> None:
        row = self.row()
        if row:
            self.rows.remove(row)
            if row.pages:
                self.pair.free(row.session, row.pages)
            if row.number is not None:
                self.pair.end(row.session, row.number)

    def give_way(self) -> None:
        row = self.row()
        if row and row.number is not None:
            if row.pages:
                self.pair.free(row.session, row.pages)
            row.pages, row.published = [], 0
            self.pair.yielded(row.session, row.number)

    def match(self) -> None:
        """Held on as a row, from which more can be published."""
        session = self.session()
        namespace, tokens = self.wanted()
        self.pair.probe(session, namespace, tokens)
        answer, found = self.pair.match(session, namespace, tokens, self.least())
        if answer == "ok":
            row = Row(session, namespace, None, tokens, found[1], len(found[1]))
            if row.pages:
                self.rows.append(row)
            if found[3][0] is not None:
                self.partial.append((session, found[3][0]))

    def drop_partial(self) -> None:
        if self.partial:
            session, ref = self.partial.pop(self.rng.randrange(len(self.partial)))
            if session in self.pair.sessions:
                self.pair.free(session, [ref])

    def share(self) -> None:
        session = self.session()
        if refs := self.some(self.held(session)):
            self.pair.share(session, refs)

    def free_some(self) -> None:
        session = self.session()
        if refs := self.some(self.held(session)):
            self.pair.free(session, refs)

    def retain(self) -> None:
        rows = [row for row in self.rows if row.published]
        if rows:
            row = self.rng.choice(rows)
            first = self.rng.randrange(row.published)
            self.pair.retain(row.session, row.pages[first : row.published], self.wish())

    def lease(self) -> None:
        session = self.session()
        self.pair.lease(session, self.rng.randint(1, 3), self.number_of(session))

    def use(self) -> None:
        session = self.session()
        if refs := self.some(sorted(self.pair.model.sessions[session].leased)):
            self.pair.use(session, refs)

    def fork(self) -> None:
        row = self.row()
        if row and row.pages:
            tokens = len(row.pages) * PAGE_SIZE - self.rng.randint(0, PAGE_SIZE - 1)
            count = self.rng.randint(1, 2)
            answer, new = self.pair.fork(row.session, row.pages, tokens, count, row.number)
            if answer == "ok":
                full = tokens // PAGE_SIZE
                twin = Row(row.session, row.namespace, None, row.tokens)
                twin.pages, twin.published = row.pages[:full] + new[:1], min(full, row.published)
                self.rows.append(twin)

    def make_writable(self) -> None:
        row = self.row()
        if row and row.pages:
            place = self.rng.randrange(len(row.pages))
            answer, got = self.pair.make_writable(row.session, row.pages[place], row.number)
            if answer == "ok" and got != [row.pages[place]]:
                self.pair.free(row.session, [row.pages[place]])
                row.pages[place], row.published = got[0], min(row.published, place)

    def seal_tail(self) -> None:
        session = self.session()
        if refs := sorted(self.pair.model.sessions[session].writing):
            self.pair.seal_tail(session, self.rng.choice(refs), self.rng.randint(1, 3))

    # --- announcing

    def announce(self) -> None:
        session = self.session()
        number = self.number_of(session)
        if number is not None:
            self.pair.announce(session, number, *self.wanted())

    def wait(self) -> None:
        announced = list(self.pair.model.waits.announced.values())
        if not announced and self.rng.random() < 0.8:
            self.start()
            return
        session = self.session()
        number = self.number_of(session)
        if number is None or self.rng.random() < 0.7:
            number = self.pair.begin(session, 1)[1]
        if number is None:
            return
        namespace, tokens = self.wanted()
        if announced and self.rng.random() < 0.8:
            one = self.rng.choice(announced)
            namespace, tokens = one.namespace, one.tokens + self.rng.choice([b"", self.prompt()])
        self.pair.wait(session, number, namespace, tokens, self.rng.choice([0.25, 0.25, 2.0]))
        if not self.is_running(number) and self.rng.random() < 0.7:
            self.rows.append(Row(session, namespace, number, tokens))

    # --- sequences

    def open(self) -> None:
        session = self.session()
        number = self.number_of(session)
        namespace, tokens = self.wanted()
        answer, found = self.pair.open_sequence(
            session,
            namespace,
            tokens,
            number,
            self.rng.choice([0, 0, 1, 2]),
            self.least(),
            number is not None and self.rng.random() < 0.3,
            self.rng.choice([None, 1.0]) if number and not self.is_running(number) else None,
        )
        if answer == "ok" and found[0]:
            self.handles.append((session, found[0], number))
            if found[3][0] is not None:
                self.partial.append((session, found[3][0]))

    def sequences_of(self, session: int) -> list[int]:
        return [handle for one, handle, _ in self.handles if one == session]

    def extend(self) -> None:
        session = self.session_with([h[0] for h in self.handles])
        rows = []
        for handle in self.some(self.sequences_of(session)):
            one = self.pair.model_sequences.open_ones[handle]
            upto = self.rng.choice([one.num_tokens, one.num_tokens, one.computed])
            tokens = self.prompt()[: self.rng.randint(0, 6) * TOKEN_BYTES]
            rows.append((handle, upto, tokens))
        if rows and self.rng.random() < 0.1:
            rows.append((self.rng.choice([0, 999]), 0, b""))
        if rows:
            self.pair.extend(session, rows)

    def fork_sequence(self) -> None:
        session = self.session_with([h[0] for h in self.handles])
        if handles := self.sequences_of(session):
            numbers = [self.number_of(session) for _ in range(self.rng.randint(1, 2))]
            answer, made = self.pair.fork_sequence(session, self.rng.choice(handles), numbers)
            if answer == "ok":
                new = zip(made[0], numbers, strict=True)
                self.handles += [(session, handle, number) for handle, number in new]

    def close(self) -> None:
        session = self.session_with([h[0] for h in self.handles])
        if handles := self.some(self.sequences_of(session)):
            assert self.pair.close(session, handles)[0] in {"ok", "SESSION_ENDED"}
            self.handles = [h for h in self.handles if h[1] not in handles]

    # --- handing over

    def hand_over(self) -> None:
        session = self.session_with([row.session for row in self.rows if row.published])
        mine = self.pair.model.sessions[session]
        if refs := self.some(sorted(mine.cached) + sorted(mine.sealed)):
            ticket = b"%d" % self.rng.getrandbits(40)
            ttl_s = self.rng.choice([1.0, 3.0, 600.0])
            if self.pair.hand_over(session, refs, ticket, ttl_s)[0] == "ok":
                self.tickets.append(ticket)

    def take_over(self) -> None:
        if self.tickets:
            self.pair.take_over(self.session(), self.rng.choice(self.tickets))

    # --- operators, time and death

    def operator_retain(self) -> None:
        duration_s = self.rng.choice([None, 1.0, 5.0])
        answer, got = self.pair.operator_retain(*self.wanted(), duration_s)
        if answer == "ok":
            self.retained.append(got[0])

    def operator_release(self) -> None:
        if self.retained:
            self.pair.operator_release(self.rng.choice(self.retained))

    def evict(self) -> None:
        self.pair.evict(self.rng.randint(0, 4))

    def flush(self) -> None:
        roots = list(self.pair.model.tree.roots)
        self.pair.flush(self.rng.choice([self.namespace(), *roots]))

    def raise_version(self) -> None:
        model, version = self.rng.choice([None, "m", "m", "n"]), self.rng.choice([1, 2, 2, 3])
        self.pair.raise_weights_version(model, version)

    def pass_time(self) -> None:
        self.pair.now += self.rng.choice([1.0, 2.0, 4.0, 8.0])
        self.pair.tick()
        self.pair.sweep_all()

    def tick(self) -> None:
        self.pair.now += 1.0
        self.pair.tick()

    def sweep(self) -> None:
        self.pair.sweep()

    def end_session(self) -> None:
        self.pair.end_session(self.session())

    def release_session(self) -> None:
        """It dies; another one comes."""
        session = self.session()
        self.pair.release_session(session)
        self.rows = [r for r in self.rows if r.session != session]
        self.handles = [h for h in self.handles if h[0] != session]
        self.pair.open(self.next_session)
        self.next_session += 1

    # --- what they must not

    def foreign(self) -> None:
        """Pages that are free, stale, another's or none at all, for every operation that takes
        some."""
        pair, session, refused = self.pair, self.session(), {"NOT_HELD", "SESSION_ENDED"}
        mine = self.held(session)
        others = [ref for s in pair.sessions for ref in self.held(s) if ref not in mine]
        free = sorted(pair.model.tree.free)[:1]
        bad = self.rng.choice([-1, pair.core.num_pages, *free, *others[:1]])
        if mine and self.rng.random() < 0.3:
            bad = mine[0] + GENERATION
        some = [*mine[:2], bad]
        assert pair.free(session, some)[0] in refused
        assert pair.share(session, some)[0] in refused
        assert pair.use(session, some)[0] in refused
        assert pair.retain(session, some, NO_WISH)[0] in refused
        assert pair.make_writable(session, bad, None)[0] in refused
        assert pair.seal_tail(session, bad, 1)[0] in refused
        assert pair.hand_over(session, some, b"x", 1.0)[0] in refused
        assert pair.fork(session, [bad], PAGE_SIZE, 1, None)[0] in refused
        page = b"\7\0\0\0" * PAGE_SIZE
        name = Namespace(model="o", weights_version=9)
        assert pair.publish(session, name, page, [bad], None)[0] in {*refused, "BAD_REQUEST"}
        if bad >= 0:
            writing = sorted(pair.model.sessions[session].writing)[:1]
            if writing:
                assert pair.publish(session, name, page, writing, bad)[0] in refused

    def twice(self) -> None:
        pair, session = self.pair, self.session()
        refused = {"BAD_REQUEST", "SESSION_ENDED"}
        if mine := self.held(session):
            one = self.rng.choice(mine)
            assert pair.free(session, [one, one])[0] in refused
            assert pair.share(session, [one, one])[0] in refused
            assert pair.hand_over(session, [one, one], b"x", 1.0)[0] in refused
            name = Namespace(model="o", weights_version=9)
            assert pair.publish(session, name, b"\7\0\0\0" * 8, [one, one], None)[0] in refused


WEIGHTS: dict[Callable[[RandomWorkers], None], int] = {
    RandomWorkers.start: 14,
    RandomWorkers.grow: 6,
    RandomWorkers.publish: 18,
    RandomWorkers.finish: 10,
    RandomWorkers.give_way: 2,
    RandomWorkers.match: 5,
    RandomWorkers.drop_partial: 2,
    RandomWorkers.share: 1,
    RandomWorkers.free_some: 2,
    RandomWorkers.retain: 2,
    RandomWorkers.lease: 1,
    RandomWorkers.use: 1,
    RandomWorkers.fork: 2,
    RandomWorkers.make_writable: 1,
    RandomWorkers.seal_tail: 2,
    RandomWorkers.announce: 2,
    RandomWorkers.wait: 4,
    RandomWorkers.open: 5,
    RandomWorkers.extend: 8,
    RandomWorkers.fork_sequence: 2,
    RandomWorkers.close: 3,
    RandomWorkers.hand_over: 2,
    RandomWorkers.take_over: 3,
    RandomWorkers.operator_retain: 2,
    RandomWorkers.operator_release: 1,
    RandomWorkers.evict: 3,
    RandomWorkers.flush: 1,
    RandomWorkers.raise_version: 1,
    RandomWorkers.pass_time: 2,
    RandomWorkers.tick: 1,
    RandomWorkers.sweep: 3,
    RandomWorkers.end_session: 1,
    RandomWorkers.release_session: 2,
    RandomWorkers.foreign: 1,
    RandomWorkers.twice: 1,
}
OPERATIONS = {operation.__name__: operation for operation in WEIGHTS}
NAMES = [operation.__name__ for operation, weight in WEIGHTS.items() for _ in range(weight)]


def random_steps(rng: random.Random, count: int) -> list[Step]:
    return [(rng.choice(NAMES), rng.getrandbits(32)) for _ in range(count)]


def play(seed: int, steps: list[Step], check_every: int = 1, strict: bool = True) -> int:
    """One run in a world that the seed makes; returns the number of operations on both."""
    workers = RandomWorkers(seed, check_every, strict)
    for step in steps:
        workers.play(step)
    workers.pair.check()
    return workers.pair.num_operations
