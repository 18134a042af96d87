"""Who has which page: sessions, their own pages, and their holds on pages of the tree.

Who owns a page, at any time exactly one of:

    free list ──allocate──► session.writing ──publish──► tree node, held by the session
        │  ▲  └──lease──► session.leased ──use──► writing         │
        │  │                     │                                │
        │  ├────────free─────────┴── session.sealed (several sessions' at once) ◄─ seal_tail,
        │  │                                     or publish, where the tree has the tokens already
        │  └──evict── tree node whose last hold has ended (cached until then, and matchable)
        └───
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from itertools import pairwise

from kvd.free_list import FreeList
from kvd.metadata import Metadata, ProcessEntry
from kvd.metadata.page_states import MAX_SESSION
from kvd.node import Node
from kvd.options import CacheOptions
from kvd.radix_tree import RadixTree
from kvd.session import Session
from kvd.tree_reading import Span
from kvd_shared.errors import BadRequest, NotHeld, OverLimit, SessionEnded
from kvd_shared.refs import REF_BYTES, generation_of, page_of

Piece = tuple[int, Span | None]
SWEEP_PAGES = 2048  # of a dead session, in one portion


class Holdings:
    """Invariants (`cache_check.check_cache`): every page is in exactly one place of the picture
    above; what nodes and sessions say of each other's holds agrees; `sealed` has, for each sealed
    page outside the tree, how many tokens it has and how often it is held by all sessions."""

    def __init__(
        self, num_pages: int, page_size: int, options: CacheOptions, meta: Metadata | None
    ) -> None:
        self.meta = Metadata.in_memory(num_pages, page_size) if meta is None else meta
        self.num_pages = num_pages
        self.page_size = page_size
        self.options = options
        self.free_list = FreeList(num_pages, self.meta.pages)
        self.tree = RadixTree(num_pages, page_size, options, self.meta)
        self.sessions: dict[int, Session] = {}
        self.sealed: dict[int, tuple[int, int]] = {}  # reference -> (tokens, holds of all)
        self._dead: deque[Session] = deque()  # what they hold comes back in portions

    # --- sessions

    def open_session(
        self, session_id: int, name: str, now: float, process: ProcessEntry | None = None
    ) -> Session:
        """`process`: who is behind it; only what has none is forgotten over a restart."""
        assert session_id not in self.sessions, f"session {session_id} is open"
        assert session_id < MAX_SESSION, f"session {session_id} cannot be recorded as an owner"
        if process is not None:
            self.meta.sessions.opened(session_id, process)
        session = self.sessions[session_id] = Session(session_id, name, now)
        return session

    def live(self, session: Session) -> None:
        if session.ended:
            raise SessionEnded(f"session {session.id} is over: attach again")

    def bury(self, session: Session) -> None:
        """The process is proven dead, or has unmapped the pool: `sweep` takes back all it holds."""
        assert session.ended
        self._dead.append(session)

    def _sweep_dead(self, now: float) -> bool:
        """Take back a portion of what a dead session holds; returns whether there was one."""
        if not self._dead:
            return False
        session, room = self._dead[0], SWEEP_PAGES
        while room > 0 and session.nodes:
            node = next(iter(session.nodes))
            room -= 64 + node.num_pages // 8  # a node costs about as much as so many pages
            span = Span(node, node.depth, node.end)
            self.tree.release(span, session, now, node.holders[session])
        gone: list[int] = []
        while room > 0 and (own := session.writing or session.leased or session.sealed):
            ref, count = own.popitem()
            room -= 1
            if own is not session.sealed or self._unseal(ref, count):
                gone.append(ref)
        self.put(gone)
        if not (session.nodes or session.writing or session.leased or session.sealed):
            self._dead.popleft()
            del self.sessions[session.id]
            self.meta.sessions.gone(session.id)
        return True

    # --- pages

    @property
    def num_available(self) -> int:
        """Pages that are free or can be made so at once."""
        return len(self.free_list) + self.tree.num_evictable

    def take(self, session: Session, count: int, now: float) -> bytes:
        """New pages for the session to write. The caller has checked that they can be had."""
        refs, writing = self._take(session, count, now), session.writing
        for ref in refs:
            writing[ref] = 1
        return refs.tobytes()

    def take_ahead(self, session: Session, count: int, now: float) -> bytes:
        """The same, leased: not to be written yet."""
        refs = self._take(session, count, now)
        for ref in refs:
            session.leased[ref] = 1
        return refs.tobytes()

    def _take(self, session: Session, count: int, now: float) -> array[int]:
        short = count - len(self.free_list)
        refs = self.free_list.take(count if short <= 0 else count - short)
        if short > 0:
            refs.extend(self.free_list.renew(self.tree.evict(short, now)))
        self.meta.pages.taken(refs.tobytes(), session.id)
        return refs

    def put(self, refs: list[int]) -> None:
        if refs:
            self.free_list.put(array("q", refs).tobytes())

    def share(self, session: Session, refs: bytes) -> None:
        """One hold more on each of the pages, all of which the session holds."""
        self.live(session)
        self._share(session, self.check_held(session, refs))

    def _share(self, session: Session, pieces: Iterable[Piece]) -> None:
        for ref, span in pieces:
            if span is not None:
                self.tree.hold(span, session)
                continue
            own = session.own(ref)
            assert own is not None
            own[ref] += 1
            if own is session.sealed:
                tokens, holds = self.sealed[ref]
                self.sealed[ref] = tokens, holds + 1

    def free(self, session: Session, refs: bytes, now: float) -> None:
        """One hold less on each of the pages. The last hold's end makes a page of the caller's
        own free, and a page in the tree evictable."""
        self.live(session)
        gone: list[int] = []
        for ref, span in self.check_held(session, refs):
            if span is not None:
                tenant = span.node.root.tenant
                self.tree.release(span, session, now)
                if tenant.num_pages > tenant.max_pages:
                    self.free_list.put(self.tree.evict_over_share(tenant, now))
                continue
            own = session.own(ref)
            assert own is not None
            own[ref] -= 1
            last = not own[ref]
            if last:
                del own[ref]
            if own is session.sealed:
                last = self._unseal(ref, 1)
            if last:
                gone.append(ref)
        self.put(gone)

    def move_holds(self, giver: Session, taker: Session, refs: bytes, now: float) -> None:
        """One hold on each of these sealed pages, which `giver` has, becomes `taker`'s."""
        for ref, span in self.tree.pieces(refs):
            if span is not None:
                node = self.tree.hold(span, taker, join=False)
                self.tree.release(Span(node, node.depth, node.end), giver, now)
                continue
            taker.sealed[ref] = taker.sealed.get(ref, 0) + 1
            giver.sealed[ref] -= 1
            if not giver.sealed[ref]:
                del giver.sealed[ref]

    def seal(self, session: Session, ref: int, num_tokens: int) -> None:
        """A page of the session's own is complete, with so many tokens, and stays out of the
        tree."""
        self.meta.records.sealed_outside(ref, num_tokens)
        holds = session.sealed[ref] = session.writing.pop(ref)
        self.sealed[ref] = num_tokens, holds

    def _unseal(self, ref: int, count: int) -> bool:
        """So many holds less on a sealed page outside the tree: is nobody left?"""
        tokens, holds = self.sealed[ref]
        if holds > count:
            self.sealed[ref] = tokens, holds - count
            return False
        del self.sealed[ref]
        return True

    # --- refusing

    def check_held(self, session: Session, refs: bytes) -> Iterable[Piece]:
        """Raise unless the session holds each of the pages, none of which is named twice. Returns
        the pieces, good for one pass that adds or takes holds."""
        private: set[int] = set()
        nodes: set[Node] = set()
        pieces: list[Piece] = []
        several, at, pages = False, 0, array("q", refs)
        while at < len(pages):
            ref = pages[at]
            if session.own(ref) is not None:
                if ref in private:
                    raise BadRequest(TWICE)
                private.add(ref)
                pieces.append((ref, None))
                at += 1
                continue
            span = self.tree.span_at(refs, at)
            if span is None or session not in span.node.holders:
                raise self.not_held(session, ref)
            several = several or span.node in nodes
            nodes.add(span.node)
            pieces.append((ref, span))
            at += span.stop - span.start
        if not several:  # holds on one node move no other node's pages that the session holds
            return pieces
        spans = sorted(
            (span for _, span in pieces if span is not None), key=lambda s: (s.node.id, s.start)
        )
        for one, next_one in pairwise(spans):
            if one.node is next_one.node and one.stop > next_one.start:
                raise BadRequest(TWICE)
        return self.tree.pieces(refs)

    def check_count(self, count: int) -> None:
        if not 0 < count <= self.num_pages:
            raise BadRequest(
                f"a count of {count}: must be from 1 to the pool's {self.num_pages} pages"
            )

    def check_room(self, session: Session, more: int) -> None:
        """Raise if the session would then hold more pages than a session may."""
        most = self.options.limits.max_pages_a_session
        if most is not None and (held := session.num_held_pages) + more > most:
            raise OverLimit(
                f"session {session.id} holds {held} pages and asks for {more} more; a session may "
                f"hold {most} (limits.max_pages_a_session): free some first",
                limit="max_pages_a_session",
                value=held + more,
                most=most,
            )

    def not_held(self, session: Session, ref: int) -> NotHeld:
        page, generation = page_of(ref), generation_of(ref)
        why = "it does not hold that page: freed twice?"
        if not 0 <= page < self.num_pages:
            why = f"the pool has pages 0 to {self.num_pages - 1}"
        elif not self.free_list.is_current(ref):
            now = generation_of(self.free_list.current(page))
            why = f"that page is at generation {now}: a reference kept after its last free?"
        return NotHeld(
            f"session {session.id} named page {page}, generation {generation}: {why}",
            page=page,
            generation=generation,
        )


TWICE = "a page is named twice in one request: use one request for each hold"


def ref_at(refs: bytes, position: int) -> int:
    at = position * REF_BYTES
    return int.from_bytes(refs[at : at + REF_BYTES], "little", signed=True)
