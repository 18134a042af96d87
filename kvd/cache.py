"""The cache core of one pool: every operation of docs/protocol.md, without I/O.

The clock is passed in. An operation that raises has changed nothing (a refused request for pages
leaves its demand in the queue, see age_queue.py).

Who owns a page, at any time exactly one of:

    free list ──allocate──► session.writing ──publish──► tree node, held by the session
        ▲                        │      └──publish, the tree has the tokens──► session.sealed
        └──────────free──────────┴───────free────────────────────────────────────┘
        └──evict── tree node whose last hold has ended (cached until then, and matchable)
"""

from __future__ import annotations

from array import array

import numpy as np

from kvd.age_queue import AgeQueue, Request
from kvd.free_list import FreeList
from kvd.radix_tree import RadixTree, Span, Walk
from kvd.results import Counters, Match, Published
from kvd.session import Session
from kvd_shared.errors import BadRequest, Draining, NoPages, NotHeld, SessionEnded
from kvd_shared.namespace import Namespace
from kvd_shared.refs import (
    REF_BYTES,
    TOKEN_BYTES,
    PageRefs,
    generation_of,
    page_of,
    refs_from_bytes,
)

MAX_BEGUN_AT_ONCE = 4096


class CacheManager:
    """Pages, sessions, tree and queue of one pool. All mutation goes through its methods.

    Invariants (`cache_check.check_cache`): every page is in exactly one place of the picture
    above; what nodes and sessions say of each other's holds agrees; RadixTree's and AgeQueue's own.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.free_list = FreeList(num_pages)
        self.tree = RadixTree(num_pages, page_size)
        self.queue = AgeQueue()
        self.counters = Counters()
        self.sessions: dict[int, Session] = {}
        self.draining = False  # begin no more requests
        self.to_yield: list[Request] = []  # for the server to pass on; it empties the list

    # --- sessions

    def open_session(self, session_id: int, name: str, now: float) -> Session:
        assert session_id not in self.sessions, f"session {session_id} is open"
        session = self.sessions[session_id] = Session(session_id, name, now)
        return session

    def end_session(self, session: Session) -> None:
        """Refuse the session's further requests. What it holds stays: its process may still be
        reading and writing those pages."""
        session.ended = True
        self.queue.drop_session(session)

    def release_session(self, session: Session, now: float) -> None:
        """The process is proven dead, or has unmapped the pool: take back all that it holds."""
        self.end_session(session)
        for node in list(session.nodes):
            span = Span(node, 0, node.num_pages)
            self.tree.release(span, session, now, node.holders[session])
        self._put([*session.writing, *session.sealed])
        session.writing.clear()
        session.sealed.clear()
        del self.sessions[session.id]

    # --- requests (one a sequence)

    def begin(self, session: Session, count: int) -> int:
        """Number `count` sequences for their age; returns the first number."""
        self._live(session)
        if not 0 < count <= MAX_BEGUN_AT_ONCE:
            raise BadRequest(
                f"a count of {count} sequences: must be from 1 to {MAX_BEGUN_AT_ONCE} at once"
            )
        if self.draining:
            raise Draining("the daemon is shutting down and begins no more requests")
        return self.queue.begin(session, count)

    def end(self, session: Session, number: int) -> None:
        """The sequence is over. Its pages are freed separately."""
        self._live(session)
        self.queue.end(self.queue.get(session, number))

    def yielded(self, session: Session, number: int) -> None:
        """The sequence has freed its pages and queues again with its old number."""
        self._live(session)
        self.queue.yielded(self.queue.get(session, number))

    # --- pages

    @property
    def num_available(self) -> int:
        """Pages that are free or can be made so at once."""
        return len(self.free_list) + self.tree.num_evictable

    def match(self, session: Session, namespace: Namespace, tokens: bytes) -> Match:
        """Hold the longest cached prefix of the tokens, never all of them: the last token is
        recomputed for its logits."""
        self._live(session)
        return self._hold_match(session, self._walk(namespace, tokens), tokens)

    def probe(self, session: Session, namespace: Namespace, tokens: bytes) -> int:
        """How many tokens `match` would find now. Holds nothing and refreshes nothing."""
        self._live(session)
        return self._walk(namespace, tokens).num_pages * self.page_size

    def acquire(
        self,
        session: Session,
        namespace: Namespace,
        tokens: bytes,
        num_pages: int,
        number: int | None,
    ) -> Match:
        """Match, and allocate what is missing to `num_pages`: both, or neither with NoPages."""
        self._live(session)
        self._check_count(num_pages)
        request = None if number is None else self.queue.get(session, number)
        walk = self._walk(namespace, tokens)
        # Cached pages that will be held are available no longer: to others they are taken.
        will_be_held = sum(s.stop - s.start for s in walk.spans if not s.node.protected)
        missing = max(num_pages - walk.num_pages, 0)
        self._admit(request, missing + will_be_held)
        held = self._hold_match(session, walk, tokens)
        new = self._take(session, missing)
        return Match(held.refs + new, held.num_matched_pages, held.matched_tokens, held.stop)

    def allocate(self, session: Session, num_pages: int, number: int | None) -> bytes:
        """New pages, the caller's to write: all of them, or NoPages with how many were missing."""
        self._live(session)
        self._check_count(num_pages)
        request = None if number is None else self.queue.get(session, number)
        self._admit(request, num_pages)
        return self._take(session, num_pages)

    def share(self, session: Session, refs: bytes) -> None:
        """One hold more on each of the pages, all of which the session holds."""
        self._live(session)
        self._check_held(session, refs)
        for ref, span in self.tree.pieces(refs):
            if span is not None:
                self.tree.hold(span, session)
            else:
                own = session.writing if ref in session.writing else session.sealed
                own[ref] += 1

    def free(self, session: Session, refs: bytes, now: float) -> None:
        """One hold less on each of the pages. The last hold's end makes a page of the caller's
        own free, and a page in the tree evictable."""
        self._live(session)
        self._check_held(session, refs)
        gone: list[int] = []
        for ref, span in self.tree.pieces(refs):
            if span is not None:
                self.tree.release(span, session, now)
                continue
            own = session.writing if ref in session.writing else session.sealed
            own[ref] -= 1
            if not own[ref]:
                del own[ref]
                gone.append(ref)
        self._put(gone)

    def publish(
        self,
        session: Session,
        namespace: Namespace,
        tokens: bytes,
        refs: bytes,
        after: int | None,
    ) -> Published:
        """Seal full pages and put them into the tree, behind the page `after` (None: from the
        prompt's start). `after` is in the tree and held by the session; the pages are its own, or
        those that the tree has there already.
        """
        self._live(session)
        count = len(refs) // REF_BYTES
        if not count or len(tokens) != count * self.page_size * TOKEN_BYTES:
            raise BadRequest(
                f"publish of {len(tokens) // TOKEN_BYTES} tokens in {count} pages: "
                f"every page has {self.page_size} tokens, and there must be at least one"
            )
        if after is None:
            walk = self.tree.walk(namespace, tokens, count)
        else:
            self._check_after(session, namespace, after)
            walk = self.tree.walk_after(after, tokens, count)
        known_refs, known = walk.refs, walk.num_pages  # read before a hold cuts the spans' nodes
        mine, canonical = refs_from_bytes(refs), refs_from_bytes(known_refs)
        differ: list[int] = np.flatnonzero(mine[:known] != canonical).tolist()
        self._check_publishable(session, mine, known, differ)

        for first, last in _runs(differ):
            for _, span in self.tree.pieces(canonical[first:last].tobytes()):
                assert span is not None
                self.tree.hold(span, session)
        for i in differ:
            ref = int(mine[i])
            if ref in session.writing:
                session.sealed[ref] = session.writing.pop(ref)
        end = int(canonical[-1]) if known else after
        self._insert(session, namespace, end, tokens, mine, known)
        self.counters.published_pages += count - known
        self.counters.duplicate_pages += len(differ)
        return Published(known_refs + refs[known * REF_BYTES :], count - known, len(differ))

    # --- how

    def _live(self, session: Session) -> None:
        if session.ended:
            raise SessionEnded(f"session {session.id} is over: attach again")

    def _check_count(self, count: int) -> None:
        if not 0 < count <= self.num_pages:
            raise BadRequest(
                f"a count of {count}: must be from 1 to the pool's {self.num_pages} pages"
            )

    def _walk(self, namespace: Namespace, tokens: bytes) -> Walk:
        num_tokens = len(tokens) // TOKEN_BYTES
        if not num_tokens:
            raise BadRequest("no tokens: a prompt has at least one")
        return self.tree.walk(namespace, tokens, (num_tokens - 1) // self.page_size)

    def _hold_match(self, session: Session, walk: Walk, tokens: bytes) -> Match:
        refs = walk.refs
        for span in walk.spans:  # only the last can be a part of its node, so none goes stale
            self.tree.hold(span, session)
        num_tokens = len(tokens) // TOKEN_BYTES
        matched = walk.num_pages * self.page_size
        self.counters.tokens_asked += num_tokens
        self.counters.tokens_matched += matched
        whole = walk.num_pages == (num_tokens - 1) // self.page_size
        return Match(refs, walk.num_pages, matched, "limit" if whole else "not_cached")

    def _admit(self, request: Request | None, wanted: int) -> None:
        """Raise NoPages unless this request may take that many of the available pages now."""
        allowed = self.queue.available_to(request, self.num_available)
        if wanted <= allowed:
            if request is not None:
                self.queue.served(request)
            return
        if request is not None:
            victim = self.queue.refuse(request, wanted)
            if victim is not None:
                self.to_yield.append(victim)
        raise NoPages(
            f"{wanted} pages wanted, {allowed} of the pool's {self.num_pages} are to be had "
            f"({len(self.free_list)} free, {self.tree.num_evictable} evictable, the rest held or "
            "waited for by older requests): free some, or ask again later",
            missing=wanted - allowed,
            wanted=wanted,
        )

    def _take(self, session: Session, count: int) -> bytes:
        short = count - len(self.free_list)
        if short > 0:
            self.free_list.put(self.tree.evict(short))
            self.counters.evicted_pages += short
        refs = self.free_list.take(count)
        session.writing.update(dict.fromkeys(refs_from_bytes(refs).tolist(), 1))
        return refs

    def _put(self, refs: list[int]) -> None:
        self.free_list.put(array("q", refs).tobytes())

    def _check_held(self, session: Session, refs: bytes) -> None:
        """Raise unless the session holds each of the pages, none of which is named twice."""
        pages = refs_from_bytes(refs)
        if len(pages) > 1 and len(set(pages.tolist())) != len(pages):
            raise BadRequest("a page is named twice in one request: use one request for each hold")
        for ref, span in self.tree.pieces(refs):
            if span is not None:
                held = span.node.holders.get(session, 0)
            else:
                held = session.writing.get(ref, 0) or session.sealed.get(ref, 0)
            if not held:
                raise self._not_held(session, ref)

    def _not_held(self, session: Session, ref: int) -> NotHeld:
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

    def _check_after(self, session: Session, namespace: Namespace, after: int) -> None:
        node = self.tree.node_of(after)
        if after in session.writing or after in session.sealed:
            raise BadRequest(f"page {page_of(after)} is not in the tree: publish it as well")
        if node is None or session not in node.holders:
            raise self._not_held(session, after)
        if node.namespace != namespace:
            raise BadRequest(f"page {page_of(after)} belongs to another namespace")

    def _check_publishable(
        self, session: Session, mine: PageRefs, known: int, differ: list[int]
    ) -> None:
        own = [int(mine[i]) for i in differ] + mine[known:].tolist()
        if len(set(own)) != len(own):
            raise BadRequest("a page is named twice in one publish")
        for ref in own:
            if ref not in session.writing and ref not in session.sealed:
                if self.tree.node_of(ref) is not None:
                    raise BadRequest(
                        f"page {page_of(ref)} is sealed in the tree already, for other tokens"
                    )
                raise self._not_held(session, ref)
        same = np.delete(mine[:known], differ)
        self._check_held(session, same.tobytes())

    def _insert(
        self,
        session: Session,
        namespace: Namespace,
        after: int | None,
        tokens: bytes,
        mine: PageRefs,
        known: int,
    ) -> None:
        """Move the pages behind the known ones from the session into the tree, in runs that are
        held equally often."""
        holds = [
            session.writing.pop(ref, 0) or session.sealed.pop(ref, 0)
            for ref in mine[known:].tolist()
        ]
        start, step = known, self.page_size * TOKEN_BYTES
        while start < len(mine):
            stop = start + 1
            while stop < len(mine) and holds[stop - known] == holds[start - known]:
                stop += 1
            self.tree.insert(
                namespace,
                after,
                tokens[start * step : stop * step],
                mine[start:stop].tobytes(),
                session,
                holds[start - known],
            )
            after, start = int(mine[stop - 1]), stop


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Sorted indices as half-open runs."""
    runs: list[tuple[int, int]] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
