"""Matching prompts: what is cached of them, what is missing, and who is computing that already."""

from __future__ import annotations

from collections.abc import Callable

from kvd.age_queue import AgeQueue, Request
from kvd.announcements import MAX_ANNOUNCED_BYTES, Announcements, Pending
from kvd.holdings import ref_at
from kvd.metadata import Metadata
from kvd.node import Node, Root
from kvd.options import CacheOptions
from kvd.publishing import Publishing
from kvd.results import Match, Published
from kvd.retention import NO_WISH, Retention
from kvd.session import Session
from kvd.tree_reading import Span, Walk
from kvd_shared.errors import BadRequest, Draining, NoPages, OverLimit
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES, page_of

MAX_BEGUN_AT_ONCE = 4096


class Matching(Publishing):
    """Invariants: Publishing's; those of the queue and of the announcements."""

    def __init__(
        self, num_pages: int, page_size: int, options: CacheOptions, meta: Metadata | None
    ) -> None:
        super().__init__(num_pages, page_size, options, meta)
        self.queue = AgeQueue()
        self.announcements = Announcements(page_size, self._tell)
        self.draining = False  # begin no more requests
        # (kind, request, tokens) for the server to pass on; it empties the list
        self.notices: list[tuple[str, Request, int]] = []

    # --- requests (one a sequence)

    def end_session(self, session: Session) -> None:
        """Refuse the session's further requests. What it holds stays: its process may still be
        reading and writing those pages."""
        if session.ended:
            return
        self.meta.sessions.ended(session.id)
        session.ended = True
        for request in self.queue.of_session(session):
            self.announcements.end(request)
            self.announcements.stop_waiting(request)
        self.queue.drop_session(session)

    def begin(self, session: Session, count: int) -> int:
        """Number `count` sequences for their age; returns the first number."""
        self.live(session)
        if not 0 < count <= MAX_BEGUN_AT_ONCE:
            raise BadRequest(
                f"a count of {count} sequences: must be from 1 to {MAX_BEGUN_AT_ONCE} at once"
            )
        if self.draining:
            raise Draining("the daemon is shutting down and begins no more requests")
        most = self.options.limits.max_requests_a_session
        if session.num_requests + count > most:
            raise OverLimit(
                f"session {session.id} has {session.num_requests} requests and begins {count} "
                f"more; a session may have {most} (limits.max_requests_a_session): end some first",
                limit="max_requests_a_session",
                value=session.num_requests + count,
                most=most,
            )
        session.num_requests += count
        return self.queue.begin(session, count)

    def end(self, session: Session, number: int) -> None:
        """The sequence is over. Its pages are freed separately."""
        self.live(session)
        request = self.queue.get(session, number)
        self._computes_no_more(request)
        self.queue.end(request)
        session.num_requests -= 1

    def yielded(self, session: Session, number: int) -> None:
        """The sequence has freed its pages and queues again with its old number."""
        self.live(session)
        request = self.queue.get(session, number)
        self._computes_no_more(request)
        self.queue.yielded(request)

    # --- matching

    def match(
        self,
        session: Session,
        namespace: Namespace,
        tokens: bytes,
        now: float,
        min_partial: int | None = None,
    ) -> Match:
        """Hold the longest cached prefix of the tokens, never all of them: the last token is
        recomputed for its logits. And a page that continues it with at least `min_partial` tokens
        (None: do not look for one)."""
        self.live(session)
        walk = self._walk(namespace, tokens, now)
        partial = self._partial(walk, tokens, min_partial, now)
        self.check_room(session, walk.num_pages + (partial is not None))
        return self._hold_match(session, walk, tokens, namespace, partial, now)

    def probe(self, session: Session, namespace: Namespace, tokens: bytes, now: float) -> int:
        """How many tokens `match` would find now. Holds nothing and refreshes nothing."""
        self.live(session)
        return self._walk(namespace, tokens, now).num_pages * self.page_size

    def acquire(
        self,
        session: Session,
        namespace: Namespace,
        tokens: bytes,
        num_pages: int,
        number: int | None,
        now: float,
        min_partial: int | None = None,
        announce: bool = False,
        own_rate: float | None = None,
    ) -> Match:
        """Match, and allocate what is missing to `num_pages`: both, or neither with NoPages.

        `announce`: say that the request computes the rest of the prompt. `own_rate` (tokens/s that
        the caller computes; None: never): if another request is computing more of the prompt and
        will be sooner, hold nothing and wait for it; the result's `stop` is "pending" then.
        """
        self.live(session)
        self.check_count(num_pages)
        request = None if number is None else self.queue.get(session, number)
        if request is None and (announce or own_rate is not None):
            raise BadRequest("only a request with a number can announce or wait: begin it first")
        walk = self._walk(namespace, tokens, now)
        partial = self._partial(walk, tokens, min_partial, now)
        missing = max(num_pages - walk.num_pages, 0)
        self.check_room(session, missing + walk.num_pages)
        if own_rate is not None and request is not None:
            waits = self._wait(request, namespace, tokens, walk.num_pages, own_rate, now)
            if waits is not None:
                return waits
        # Cached pages that will be held are available no longer: to others they are taken.
        will_be_held = 0
        for span in walk.spans:
            if not span.node.protected:
                will_be_held += span.stop - span.start
        if partial is not None:
            more = 0 if partial[0].protected else 1
            room = self.queue.available_to(request, self.num_available)
            most = self.options.limits.max_pages_a_session
            full = most is not None and session.num_held_pages + missing + walk.num_pages >= most
            if not missing or full or missing + will_be_held + more > room:
                partial = None  # not wanted, or its place is needed more
            else:
                will_be_held += more
        self._admit(request, missing + will_be_held)
        held = self._hold_match(session, walk, tokens, namespace, partial, now)
        if (
            announce
            and request is not None
            and not self._announce(request, namespace, tokens, walk.num_pages, now)
        ):
            self.announcements.end(request)  # what it computed before
        if missing:
            self.counters.allocated_pages += missing
            held.refs += self.take(session, missing, now)
        return held

    def publish(
        self,
        session: Session,
        namespace: Namespace,
        tokens: bytes,
        refs: bytes,
        after: int | None,
        now: float,
        retention: Retention = NO_WISH,
    ) -> Published:
        """See Publishing. Whoever waits for these tokens is told."""
        done = super().publish(session, namespace, tokens, refs, after, now, retention)
        if self.announcements:
            self._note_progress(session, namespace, ref_at(done.refs, 0), now)
        return done

    # --- announcing and waiting

    def announce(
        self, session: Session, number: int, namespace: Namespace, tokens: bytes, now: float
    ) -> None:
        """The request computes these tokens: others may wait for them."""
        self.live(session)
        request = self.queue.get(session, number)
        walk = self._walk(namespace, tokens, now)
        if not self._announce(request, namespace, tokens, walk.num_pages, now):
            raise OverLimit(
                f"{self.announcements.num_bytes} bytes of prompts are announced already, of "
                f"{MAX_ANNOUNCED_BYTES} in a pool: compute without",
                limit="announced_bytes",
                value=self.announcements.num_bytes + len(tokens),
                most=MAX_ANNOUNCED_BYTES,
            )

    def wait(
        self,
        session: Session,
        number: int,
        namespace: Namespace,
        tokens: bytes,
        own_rate: float,
        now: float,
    ) -> Match | None:
        """Wait for what others are computing of the prompt, if that is sooner than computing at
        `own_rate` tokens/s; None: there is nothing to wait for."""
        self.live(session)
        request = self.queue.get(session, number)
        walk = self._walk(namespace, tokens, now)
        return self._wait(request, namespace, tokens, walk.num_pages, own_rate, now)

    def _announce(
        self, request: Request, namespace: Namespace, tokens: bytes, cached_pages: int, now: float
    ) -> bool:
        """Whether there was room. What could not be published is not announced."""
        if self.versions.is_stale(namespace):
            self.announcements.end(request)
            return True
        return self.announcements.announce(request, namespace, tokens, cached_pages, now)

    def flush(self, roots: list[Root], reason: str = "flushed") -> None:
        """See Publishing. Who computes behind what was flushed will not publish it."""
        super().flush(roots, reason)
        if self.announcements:
            gone = {root.namespace for root in roots}
            self._end_announcements(lambda namespace: namespace in gone)

    def raise_weights_version(self, model: str | None, version: int) -> None:
        """KV of a lower version of the model (None: of every model) cannot be published from now
        on. The caller flushes the namespaces that are stale then."""
        self.versions.raise_to(model, version)
        self._end_announcements(self.versions.is_stale)

    def _end_announcements(self, of: Callable[[Namespace], bool]) -> None:
        for announcement in list(self.announcements):
            if of(announcement.namespace):
                self.announcements.end(announcement.request)

    def _wait(
        self,
        request: Request,
        namespace: Namespace,
        tokens: bytes,
        cached_pages: int,
        own_rate: float,
        now: float,
    ) -> Match | None:
        if not own_rate > 0:
            raise BadRequest(f"own_rate = {own_rate} tokens/s: must be above 0")
        if request.running:
            raise BadRequest(
                f"request {request.number} has pages: only one that holds none may wait; free "
                "them and say yielded first"
            )
        self.announcements.stop_waiting(request)
        pending = self._pending(namespace, tokens, cached_pages, now, request)
        if pending is None:
            return None
        own_s = (pending.tokens - cached_pages * self.page_size) / own_rate
        if pending.seconds is not None and pending.seconds > own_s:
            return None
        if not self.announcements.wait(request, pending):
            return None
        self.queue.wants_nothing(request)
        matched = cached_pages * self.page_size
        found = Match(b"", 0, matched, "pending")
        found.pending_tokens, found.pending_s = pending.tokens, pending.seconds
        return found

    def _pending(
        self,
        namespace: Namespace,
        tokens: bytes,
        cached_pages: int,
        now: float,
        but: Request | None = None,
    ) -> Pending | None:
        most = self._max_pages(tokens)
        return self.announcements.pending(namespace, tokens, most, cached_pages, now, but)

    def _note_progress(
        self, session: Session, namespace: Namespace, first_ref: int, now: float
    ) -> None:
        place = self.tree.depth_of(page_of(first_ref))
        for announcement in self.announcements.of_session(session):
            if announcement.namespace == namespace and place <= announcement.done_pages:
                walk = self.tree.walk(namespace, announcement.tokens, announcement.num_pages, now)
                self.announcements.published(announcement, walk.num_pages, now)

    def _computes_no_more(self, request: Request) -> None:
        self.announcements.end(request)
        self.announcements.stop_waiting(request)

    def _tell(self, kind: str, request: Request, tokens: int) -> None:
        self.notices.append((kind, request, tokens))

    # --- how

    def _max_pages(self, tokens: bytes) -> int:
        return (len(tokens) // TOKEN_BYTES - 1) // self.page_size

    def _walk(self, namespace: Namespace, tokens: bytes, now: float) -> Walk:
        num_tokens = len(tokens) // TOKEN_BYTES
        most = self.options.limits.max_prompt_tokens
        if not 0 < num_tokens <= most:
            if not num_tokens:
                raise BadRequest("no tokens: a prompt has at least one")
            raise OverLimit(
                f"a prompt of {num_tokens} tokens; the limit is {most} (limits.max_prompt_tokens)",
                limit="max_prompt_tokens",
                value=num_tokens,
                most=most,
            )
        return self.tree.walk(namespace, tokens, (num_tokens - 1) // self.page_size, now)

    def _partial(
        self, walk: Walk, tokens: bytes, min_partial: int | None, now: float
    ) -> tuple[Node, int, int] | None:
        if min_partial is None:
            return None
        if not 0 < min_partial < self.page_size:
            raise BadRequest(
                f"min_partial = {min_partial}: must be from 1 to {self.page_size - 1} tokens, "
                "or nil"
            )
        found = self.tree.partial(walk, tokens, len(tokens) // TOKEN_BYTES - 1, now)
        return found if found is not None and found[2] >= min_partial else None

    def _hold_match(
        self,
        session: Session,
        walk: Walk,
        tokens: bytes,
        namespace: Namespace,
        partial: tuple[Node, int, int] | None,
        now: float,
    ) -> Match:
        refs, counters, tree = walk.refs, self.counters, self.tree
        own = 0
        for span in walk.spans:  # only the last can be a part of its node, so none goes stale
            if span.node.publisher == session.id:
                own += span.stop - span.start
            tree.hold(span, session, hit=True)
        num_tokens = len(tokens) // TOKEN_BYTES
        matched = walk.num_pages * self.page_size
        counters.tokens_asked += num_tokens
        counters.tokens_matched += matched
        counters.tokens_matched_own += own * self.page_size
        if walk.num_pages == (num_tokens - 1) // self.page_size:
            stop = "limit"
        else:
            stop = "not_cached"
            if walk.last is None and self.versions.is_stale(namespace):  # it has no tree then
                stop = "stale_version"
        found = Match(refs, walk.num_pages, matched, stop)
        if partial is not None:
            node, place, found.partial_tokens = partial
            page = tree.hold(Span(node, place, place + 1), session, hit=True, join=False)
            found.partial_ref = ref_at(bytes(page.refs), 0)
            counters.tokens_partial += found.partial_tokens
        if self.announcements and stop == "not_cached":
            pending = self._pending(namespace, tokens, walk.num_pages, now)
            if pending is not None:
                found.pending_tokens, found.pending_s = pending.tokens, pending.seconds
        return found

    def has_room(self, number: int | None, session: Session, num_pages: int) -> bool:
        """Whether so many pages can be had for what is not needed yet."""
        request = None if number is None else self.queue.get(session, number)
        most = self.options.limits.max_pages_a_session
        return num_pages <= self.queue.available_to(request, self.num_available) and (
            most is None or session.num_held_pages + num_pages <= most
        )

    def _may_take(self, session: Session, num_pages: int, number: int | None) -> None:
        self.live(session)
        self.check_count(num_pages)
        request = None if number is None else self.queue.get(session, number)
        self.check_room(session, num_pages)
        self._admit(request, num_pages)
        self.counters.allocated_pages += num_pages

    def _admit(self, request: Request | None, wanted: int) -> None:
        """Raise NoPages unless this request may take that many of the available pages now."""
        allowed = self.queue.available_to(request, self.num_available)
        if wanted <= allowed:
            if request is not None:
                self.announcements.stop_waiting(request)
                self.queue.served(request)
            return
        if request is not None:
            self._computes_no_more(request)
            victim = self.queue.refuse(request, wanted)
            if victim is not None:
                self.notices.append(("yield", victim, 0))
        raise NoPages(
            f"{wanted} pages wanted, {allowed} of the pool's {self.num_pages} are to be had "
            f"({len(self.free_list)} free, {self.tree.num_evictable} evictable, the rest held or "
            "waited for by older requests): free some, or ask again later",
            missing=wanted - allowed,
            wanted=wanted,
        )
