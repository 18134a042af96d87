"""A sequence handed from one worker to another: pages on their way between two sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvd.session import Session
from kvd_shared.errors import BadRequest, OverLimit, UnknownHandle
from kvd_shared.refs import page_of, refs_from_bytes

if TYPE_CHECKING:
    from kvd.cache import CacheManager

MAX_TICKETS = 1024  # of a pool
MAX_TTL_S = 600.0


@dataclass(slots=True)
class Ticket:
    refs: bytes
    keeper: Session  # holds the pages meanwhile; no process stands behind it
    expires_s: float


class Handover:
    """Invariant: each ticket's keeper holds each of its pages once, and nothing else.

    Only sealed pages travel, which nobody writes any more, and nobody reads under a keeper's hold:
    so a ticket that nobody takes can end by time alone.
    """

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._tickets: dict[bytes, Ticket] = {}
        self._next_keeper = -1  # below the ids of real sessions

    def __len__(self) -> int:
        return len(self._tickets)

    def hand_over(
        self, session: Session, refs: bytes, ticket: bytes, ttl_s: float, now: float
    ) -> None:
        """One hold on each of the pages goes from the session to whoever brings the ticket within
        `ttl_s`. The pages are in the tree, or sealed tails."""
        cache = self._cache
        cache.live(session)
        if not refs:
            raise BadRequest("hand_over of no pages")
        if not 0 < ttl_s <= MAX_TTL_S:
            raise BadRequest(f"ttl_s = {ttl_s}: must be above 0 and at most {MAX_TTL_S} seconds")
        if len(self._tickets) >= MAX_TICKETS:
            raise OverLimit(
                f"{MAX_TICKETS} tickets wait to be taken already: take some, or let them expire",
                limit="tickets",
                value=MAX_TICKETS + 1,
                most=MAX_TICKETS,
            )
        cache.check_held(session, refs)
        for ref in refs_from_bytes(refs).tolist():
            if ref in session.writing or ref in session.leased:
                raise BadRequest(
                    f"page {page_of(ref)} is not sealed: publish it, or seal the tail first"
                )
        keeper = cache.open_session(self._next_keeper, f"ticket of session {session.id}", now)
        self._next_keeper -= 1
        cache.move_holds(session, keeper, refs, now)
        self._tickets[ticket] = Ticket(refs, keeper, now + ttl_s)

    def take_over(self, session: Session, ticket: bytes, now: float) -> tuple[bytes, int]:
        """The ticket's pages, now held by the session, and how many tokens the last one has if it
        is a sealed tail (0 if not: then it is full). A ticket is good once."""
        cache = self._cache
        cache.live(session)
        found = self._tickets.get(ticket)
        if found is None or found.expires_s <= now:
            raise UnknownHandle("no such ticket: it was taken already, or has expired")
        cache.check_room(session, len(found.refs) // 8)
        del self._tickets[ticket]
        cache.move_holds(found.keeper, session, found.refs, now)
        cache.end_session(found.keeper)
        cache.bury(found.keeper)
        last = refs_from_bytes(found.refs[-8:]).tolist()[0]
        tokens = cache.sealed[last][0] if last in session.sealed else 0
        return found.refs, tokens % cache.page_size

    def tick(self, now: float) -> None:
        for ticket, found in list(self._tickets.items()):
            if found.expires_s <= now:
                del self._tickets[ticket]
                self._cache.end_session(found.keeper)
                self._cache.bury(found.keeper)
