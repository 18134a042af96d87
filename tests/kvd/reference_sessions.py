"""What the cache core promises about sessions and their pages, said again in plain dicts.

A refused operation raises before it changes anything (pages refused to a request leave its demand,
and end what it announced). New pages are the core's choice; that they were free is checked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvd.options import CacheOptions
from kvd_shared.errors import (
    BadRequest,
    NoPages,
    NotHeld,
    OverLimit,
    SessionEnded,
)
from kvd_shared.refs import GENERATION, TOKEN_BYTES
from tests.kvd.reference_pages import Choices, Page, PageTree
from tests.kvd.reference_queue import ReferenceQueue, Request
from tests.kvd.reference_waits import ReferenceWaits


@dataclass(eq=False)
class ModelSession:
    """Its pages, by where they are, each with how often it holds them."""

    number: int
    writing: Counter[int] = field(default_factory=Counter)
    leased: Counter[int] = field(default_factory=Counter)
    sealed: Counter[int] = field(default_factory=Counter)
    cached: Counter[int] = field(default_factory=Counter)
    ended: bool = False
    num_requests: int = 0

    @property
    def places(self) -> tuple[Counter[int], ...]:
        return self.writing, self.leased, self.sealed, self.cached

    @property
    def held(self) -> set[int]:
        return {ref for place in self.places for ref in place}

    def place_of(self, ref: int) -> Counter[int]:
        return next(place for place in self.places if ref in place)


class ReferenceSessions:
    def __init__(
        self, num_pages: int, page_size: int, options: CacheOptions, choices: Choices
    ) -> None:
        self.num_pages, self.page_size, self.limits = num_pages, page_size, options.limits
        self.page_bytes = page_size * TOKEN_BYTES
        self.tree = PageTree(num_pages, options, choices)
        self.queue = ReferenceQueue()
        self.waits = ReferenceWaits(page_size, self.queue)
        self.sessions: dict[int, ModelSession] = {}
        self.tails: dict[int, int] = {}  # tokens of each sealed page outside the tree
        self.dying: list[ModelSession] = []
        self.minimum: dict[str | None, int] = {}
        self.counted: Counter[str] = Counter()

    # --- sessions

    def open_session(self, number: int) -> ModelSession:
        session = self.sessions[number] = ModelSession(number)
        return session

    def live(self, session: ModelSession) -> None:
        if session.ended:
            raise SessionEnded("")

    def end_session(self, session: ModelSession) -> None:
        if not session.ended:
            session.ended = True
            for request in [r for r in self.queue.requests if r.session == session.number]:
                self.waits.computes_no_more(request)
            self.queue.end_session(session.number)

    def bury(self, session: ModelSession) -> None:
        self.dying.append(session)

    def drop(self, session: ModelSession, left: set[int], now: float) -> None:
        """The dead session now holds no more than `left`."""
        gone = [ref for ref in session.held if ref not in left]
        for ref in sorted(gone, key=lambda r: -p.depth if (p := self.tree.pages.get(r)) else 0):
            count = session.place_of(ref)[ref]
            for _ in range(count):
                self.drop_one(session, ref, now)

    def drop_one(self, session: ModelSession, ref: int, now: float) -> None:
        place = session.place_of(ref)
        place[ref] -= 1
        if not place[ref]:
            del place[ref]
        if place is session.cached:
            self.tree.unhold(session.number, self.tree.pages[ref], now)
        elif not any(ref in s.sealed for s in self.sessions.values()) and ref not in place:
            self.tails.pop(ref, None)
            self.tree.free.add(ref + GENERATION)

    # --- refusing

    def must_hold(self, session: ModelSession, refs: list[int]) -> None:
        if not session.held.issuperset(refs):
            raise NotHeld("")
        if len(set(refs)) != len(refs):
            raise BadRequest("")

    def must_have_room(self, session: ModelSession, more: int) -> None:
        most = self.limits.max_pages_a_session
        if most is not None and len(session.held) + more > most:
            raise OverLimit("")

    def must_count(self, count: int) -> None:
        if not 1 <= count <= self.num_pages:
            raise BadRequest("")

    def request(self, session: ModelSession, number: int | None) -> Request | None:
        return None if number is None else self.queue.get(session.number, number)

    def available_to(self, request: Request | None) -> int:
        available = len(self.tree.free) + self.tree.num_evictable
        return max(0, available - self.queue.reserved_from(request))

    def admit(self, request: Request | None, wanted: int) -> None:
        """Of the pages that can be had, `wanted` will be had no longer."""
        allowed = self.available_to(request)
        if wanted > allowed:
            if request is not None:
                self.waits.computes_no_more(request)
                self.queue.refused(request, wanted)
            raise NoPages("", missing=wanted - allowed)
        if request is not None:
            self.waits.stop_waiting(request)
            self.queue.served(request)

    def may_take(self, session: ModelSession, count: int, number: int | None) -> None:
        self.live(session)
        self.must_count(count)
        request = self.request(session, number)
        self.must_have_room(session, count)
        self.admit(request, count)
        self.counted["allocated_pages"] += count

    # --- pages

    def take(self, count: int, new: list[int], to: Counter[int], now: float) -> list[int]:
        self.tree.now = now
        self.tree.evict(max(0, count - len(self.tree.free)), set(new))
        assert len(new) == count and set(new) <= self.tree.free, "those pages were not free"
        self.tree.free -= set(new)
        to.update(new)
        return new

    def allocate(
        self, session: ModelSession, count: int, number: int | None, now: float, new: list[int]
    ) -> list[int]:
        self.may_take(session, count, number)
        return self.take(count, new, session.writing, now)

    def lease(
        self, session: ModelSession, count: int, number: int | None, now: float, new: list[int]
    ) -> list[int]:
        self.may_take(session, count, number)
        return self.take(count, new, session.leased, now)

    def use(self, session: ModelSession, refs: list[int]) -> None:
        self.live(session)
        self.must_hold(session, refs)
        if any(ref not in session.leased for ref in refs):
            raise BadRequest("")
        for ref in refs:
            session.writing[ref] = session.leased.pop(ref)

    def share(self, session: ModelSession, refs: list[int]) -> None:
        self.live(session)
        self.must_hold(session, refs)
        for ref in refs:
            self.hold_again(session, ref)

    def hold_again(self, session: ModelSession, ref: int) -> None:
        place = session.place_of(ref)
        place[ref] += 1
        if place is session.cached:
            self.tree.hold(session.number, self.tree.pages[ref])

    def hold_cached(self, session: ModelSession, pages: list[Page]) -> None:
        for page in pages:
            session.cached[page.ref] += 1
            self.tree.hold(session.number, page)

    def give_back(self, session: ModelSession, refs: list[int], now: float) -> None:
        """One by one. What a page's last hold alone protected can be evicted, the deepest first."""
        self.live(session)
        self.must_hold(session, refs)
        self.tree.now = now
        for ref in refs:
            page = self.tree.pages.get(ref)
            self.drop_one(session, ref, now)
            if page is not None:
                self.tree.evict_over_share(page.tenant)

    def fork(
        self, session: ModelSession, refs: list[int], num_tokens: int, count: int,
        number: int | None, now: float, new: list[int],
    ) -> list[int]:  # fmt: skip
        self.live(session)
        full, rest = divmod(num_tokens, self.page_size)
        if not 1 <= count <= 1024 or num_tokens < 1 or len(refs) != full + (rest > 0):
            raise BadRequest("")
        self.must_hold(session, refs)
        copies = count if rest else 0
        request = self.request(session, number)
        if copies:
            self.may_take(session, copies, number)
        elif request is not None:
            self.waits.stop_waiting(request)
            self.queue.served(request)
        for ref in refs[:full] * count:
            self.hold_again(session, ref)
        self.counted["copied_pages"] += copies
        return self.take(copies, new, session.writing, now)

    def make_writable(
        self, session: ModelSession, ref: int, number: int | None, now: float, new: list[int]
    ) -> list[int]:
        self.live(session)
        self.must_hold(session, [ref])
        if session.writing.get(ref) == 1:
            return [ref]
        if ref in session.leased:
            raise BadRequest("")
        self.may_take(session, 1, number)
        self.counted["copied_pages"] += 1
        return self.take(1, new, session.writing, now)

    def seal_tail(self, session: ModelSession, ref: int, num_tokens: int) -> None:
        self.live(session)
        self.must_hold(session, [ref])
        if ref not in session.writing or not 1 <= num_tokens < self.page_size:
            raise BadRequest("")
        self.seal(session, ref, num_tokens)

    def seal(self, session: ModelSession, ref: int, num_tokens: int) -> None:
        session.sealed[ref] = session.writing.pop(ref)
        self.tails[ref] = num_tokens
