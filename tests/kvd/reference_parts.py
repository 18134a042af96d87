"""Sequences on the server's side, tickets, and what operators retain: each built from the model's
own operations, as the daemon's are from its."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvd.options import CacheOptions
from kvd_shared.errors import (
    BadRequest,
    Detached,
    KvdError,
    NoPages,
    OverLimit,
    OverQuota,
    StaleVersion,
    UnknownHandle,
)
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES
from tests.kvd.reference_model import Found, ReferenceModel
from tests.kvd.reference_sessions import ModelSession

OK, NO_PAGES, UNKNOWN, BAD, STALE, DETACHED = range(6)


@dataclass(eq=False)
class ModelSequence:
    session: ModelSession
    namespace: Namespace
    number: int | None
    ahead: int
    tokens: bytes
    computed: int = 0
    published: int = 0  # pages
    refs: list[int] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)
    used: int = 0
    publishes: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES


@dataclass
class Row:
    """What one row of `extend` came to; swaps are (place, page)."""

    status: int
    new: list[int] = field(default_factory=list)
    swaps: list[tuple[int, int]] = field(default_factory=list)


class ReferenceSequences:
    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.open_ones: dict[int, ModelSequence] = {}
        self.next_handle = 1

    def of(self, session: ModelSession, handle: int) -> ModelSequence:
        sequence = self.open_ones.get(handle)
        if sequence is None or sequence.session is not session:
            raise UnknownHandle("")
        return sequence

    def add(self, sequence: ModelSequence) -> int:
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.open_ones[handle] = sequence
        return handle

    def pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.model.page_size)

    def open(
        self, session: ModelSession, namespace: Namespace, tokens: bytes, number: int | None,
        ahead: int, now: float, least: int | None, announce: bool, rate: float | None,
        new: list[int], chosen: int | None,
    ) -> tuple[int, Found]:  # fmt: skip
        if not 0 <= ahead <= 64:
            raise BadRequest("")
        mine = [s for s in self.open_ones.values() if s.session is session]
        if len(mine) >= self.model.limits.max_requests_a_session:
            raise OverLimit("")
        need = self.pages_of(len(tokens) // TOKEN_BYTES)
        found = self.model.acquire(
            session, namespace, tokens, need + ahead, number, now, least, announce, rate,
            new, chosen, ahead,
        )  # fmt: skip
        if found.stop == "pending":
            return 0, found
        matched = len(found.refs) - len(new)
        computed = matched * self.model.page_size
        one = ModelSequence(session, namespace, number, ahead, tokens, computed, matched)
        one.refs, one.used = list(found.refs), need
        return self.add(one), found

    def extend(
        self, session: ModelSession, handle: int, computed: int, tokens: bytes, now: float,
        new: list[int],
    ) -> Row:  # fmt: skip
        one = self.open_ones.get(handle)
        if one is None or one.session is not session:
            return Row(UNKNOWN)
        if not one.computed <= computed <= min(one.num_tokens, one.used * self.model.page_size):
            return Row(BAD)
        row = Row(OK)
        try:
            self.model.give_back(session, one.spare, now)
            one.spare, one.tokens, one.computed = [], one.tokens + tokens, computed
            if computed // self.model.page_size > one.published and one.publishes:
                row.status = self.publish(one, row, now)
            if one.used < self.pages_of(one.num_tokens) and not self.grow(one, row, new, now):
                row.status = NO_PAGES
        except KvdError:
            row.status = BAD
        return row

    def publish(self, one: ModelSequence, row: Row, now: float) -> int:
        start, stop = one.published, one.computed // self.model.page_size
        if stop <= start:
            return OK
        step, mine = self.model.page_bytes, one.refs[start:stop]
        after = one.refs[start - 1] if start else None
        part = one.tokens[start * step : stop * step]
        try:
            done = self.model.publish(one.session, one.namespace, part, mine, after, now)
        except (StaleVersion, Detached) as e:
            one.publishes = False
            return STALE if isinstance(e, StaleVersion) else DETACHED
        one.published = stop
        for place, (ref, canonical) in enumerate(zip(mine, done, strict=True), start):
            if ref != canonical:
                one.spare.append(ref)
                one.refs[place] = canonical
                row.swaps.append((place, canonical))
        return OK

    def grow(self, one: ModelSequence, row: Row, new: list[int], now: float) -> bool:
        session, need = one.session, self.pages_of(one.num_tokens)
        missing = need - len(one.refs)
        if missing > 0:
            try:
                self.model.allocate(session, missing, one.number, now, new[:missing])
            except (NoPages, OverLimit):
                return False
            row.new, new = row.new + new[:missing], new[missing:]
            one.refs += row.new
        for ref in one.refs[one.used : need]:
            if ref in session.leased:
                session.writing[ref] = session.leased.pop(ref)
        one.used = need
        ahead = need + one.ahead - len(one.refs)
        if ahead > 0 and self.has_room(one, ahead):
            self.model.counted["allocated_pages"] += ahead
            self.model.take(ahead, new, session.leased, now)
            one.refs += new
            row.new = row.new + new
        return True

    def has_room(self, one: ModelSequence, count: int) -> bool:
        request = self.model.request(one.session, one.number)
        most = self.model.limits.max_pages_a_session
        fits = most is None or len(one.session.held) + count <= most
        return fits and count <= self.model.available_to(request)

    def fork(
        self, session: ModelSession, handle: int, numbers: list[int | None], now: float,
        new: list[int],
    ) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
        """Handles, new pages, and the page to be copied into the first of each's."""
        model = self.model
        model.live(session)
        one = self.of(session, handle)
        if not 1 <= len(numbers) <= 1024:
            raise BadRequest("")
        requests = [model.queue.get(session.number, n) for n in numbers if n is not None]
        full, rest = divmod(one.computed, model.page_size)
        model.must_hold(session, one.refs[:full])
        own = len(one.refs) - full
        if own:
            model.may_take(session, own * len(numbers), numbers[0])
        for request in requests:
            model.waits.stop_waiting(request)
            model.queue.served(request)
        for ref in one.refs[:full] * len(numbers):
            model.hold_again(session, ref)
        model.take(own * len(numbers), new, session.writing, now)
        handles = []
        for i, number in enumerate(numbers):
            twin = ModelSequence(session, one.namespace, number, one.ahead, one.tokens)
            twin.computed, twin.published, twin.used = one.computed, one.published, one.used
            twin.publishes = one.publishes
            twin.refs = one.refs[:full] + new[i * own : (i + 1) * own]
            for ref in twin.refs[one.used :]:
                session.leased[ref] = session.writing.pop(ref)
            handles.append(self.add(twin))
        model.counted["copied_pages"] += len(numbers) if rest else 0
        return handles, new, one.refs[full : full + 1] if rest else []

    def close(self, session: ModelSession, handles: list[int], now: float) -> None:
        self.model.live(session)
        sequences = [self.of(session, handle) for handle in handles]
        if len(set(handles)) != len(handles):
            raise BadRequest("")
        for handle, one in zip(handles, sequences, strict=True):
            del self.open_ones[handle]
            try:
                self.model.give_back(session, one.refs + one.spare, now)
            except KvdError:
                for ref in one.refs + one.spare:
                    if ref in session.held:
                        self.model.give_back(session, [ref], now)

    def drop_session(self, session: ModelSession) -> None:
        gone = [handle for handle, one in self.open_ones.items() if one.session is session]
        for handle in gone:
            del self.open_ones[handle]


class ReferenceTickets:
    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.tickets: dict[bytes, tuple[list[int], float, ModelSession]] = {}
        self.next_keeper = -1

    def hand_over(
        self, session: ModelSession, refs: list[int], ticket: bytes, ttl_s: float, now: float
    ) -> None:
        self.model.live(session)
        if not refs or not 0 < ttl_s <= 600.0:
            raise BadRequest("")
        self.model.must_hold(session, refs)
        if any(ref in session.writing or ref in session.leased for ref in refs):
            raise BadRequest("")
        keeper = self.model.open_session(self.next_keeper)
        self.next_keeper -= 1
        self.move(session, keeper, refs, now)
        self.tickets[ticket] = refs, now + ttl_s, keeper

    def move(self, giver: ModelSession, taker: ModelSession, refs: list[int], now: float) -> None:
        for ref in refs:
            if ref in giver.cached:
                self.model.hold_cached(taker, [self.model.tree.pages[ref]])
            else:
                taker.sealed[ref] += 1
            self.model.drop_one(giver, ref, now)

    def take_over(self, session: ModelSession, ticket: bytes, now: float) -> tuple[list[int], int]:
        self.model.live(session)
        refs, expires_s, keeper = self.tickets.get(ticket, ([], now, None))
        if keeper is None or expires_s <= now:
            raise UnknownHandle("")
        self.model.must_have_room(session, len(refs))
        del self.tickets[ticket]
        self.move(keeper, session, refs, now)
        self.give_up(keeper)
        return refs, self.model.tails.get(refs[-1], 0) % self.model.page_size

    def give_up(self, keeper: ModelSession) -> None:
        self.model.end_session(keeper)
        self.model.bury(keeper)

    def tick(self, now: float) -> None:
        for ticket, (_, expires_s, keeper) in list(self.tickets.items()):
            if expires_s <= now:
                del self.tickets[ticket]
                self.give_up(keeper)


class ReferenceOperator:
    def __init__(self, model: ReferenceModel, options: CacheOptions) -> None:
        self.model = model
        self.quota = int(options.operator_quota * model.num_pages + 1e-6)
        self.retained: dict[int, tuple[list[int], float | None]] = {}
        self.next_number = 1

    def retain(
        self, namespace: Namespace, tokens: bytes, duration_s: float | None, now: float
    ) -> tuple[int, int]:
        if duration_s is not None and not 0 < duration_s < float("inf"):
            raise BadRequest("")
        found = self.model.tree.walk(namespace, self.model.keys(tokens), now)
        if not found:
            raise BadRequest("")
        held = self.model.sessions[0].held if 0 in self.model.sessions else set()
        if len(held | {page.ref for page in found}) > self.quota:
            raise OverQuota("")
        if 0 not in self.model.sessions:
            self.model.open_session(0)
        self.model.hold_cached(self.model.sessions[0], found)
        number, self.next_number = self.next_number, self.next_number + 1
        until = None if duration_s is None else now + duration_s
        self.retained[number] = [page.ref for page in found], until
        return number, len(found) * self.model.page_size

    def release(self, number: int, now: float) -> None:
        if number not in self.retained:
            raise UnknownHandle("")
        self.model.give_back(self.model.sessions[0], self.retained.pop(number)[0], now)

    def tick(self, now: float) -> None:
        for number, (_, until) in list(self.retained.items()):
            if until is not None and until <= now:
                self.release(number, now)
