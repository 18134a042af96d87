"""The cache core of one pool: every operation of docs/protocol.md, without I/O.

The clock is passed in. An operation that raises has changed nothing (a refused request for pages
leaves its demand in the queue, see age_queue.py, and announces nothing any more).

    Holdings ◄─── Publishing ◄─── Matching ◄─── CacheManager
    who has       what enters     prompts,      pages by themselves, forks,
    which page    the tree        requests      sequences, handing over, time
"""

from __future__ import annotations

from kvd.handover import Handover
from kvd.holdings import ref_at
from kvd.matching import Matching
from kvd.metadata import Metadata
from kvd.operator_retains import OperatorRetains
from kvd.options import CacheOptions
from kvd.sequences import Sequences
from kvd.session import Session
from kvd_shared.errors import BadRequest
from kvd_shared.refs import REF_BYTES, page_of

MAX_FORKS = 1024  # at once
SWEEP_NODES = 32  # in one portion
NO_OPTIONS = CacheOptions()


class CacheManager(Matching):
    """Pages, sessions, tree and queue of one pool. All mutation goes through its methods and those
    of its parts.

    Invariants (`cache_check.check_cache`): those of its parts.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        options: CacheOptions = NO_OPTIONS,
        meta: Metadata | None = None,
    ) -> None:
        """`meta`: where it is written down what must outlive this process; None: in plain memory.
        What another process has left there comes back by `kvd.recovery.recover`."""
        super().__init__(num_pages, page_size, options, meta)
        self.num_changes = 0  # requests and portions of work that may have changed something
        self.vocab_size = 1 << 31  # token ids are below it; the model's, where it is known
        self.sequences = Sequences(self)
        self.handover = Handover(self)
        self.operator = OperatorRetains(self)

    # --- sessions

    def release_session(self, session: Session) -> None:
        """The process is proven dead, or has unmapped the pool: what it holds comes back, in
        portions, by `sweep`."""
        self.end_session(session)
        self.bury(session)

    # --- pages

    def allocate(self, session: Session, num_pages: int, number: int | None, now: float) -> bytes:
        """New pages, the caller's to write: all of them, or NoPages with how many were missing."""
        self._may_take(session, num_pages, number)
        return self.take(session, num_pages, now)

    def lease(self, session: Session, num_pages: int, number: int | None, now: float) -> bytes:
        """New pages ahead of need: the caller's, but not to be written before `use`."""
        self._may_take(session, num_pages, number)
        return self.take_ahead(session, num_pages, now)

    def use(self, session: Session, refs: bytes) -> None:
        """Leased pages are the caller's to write from now on."""
        self.live(session)
        self.check_held(session, refs)
        pages = [ref_at(refs, i) for i in range(len(refs) // REF_BYTES)]
        for ref in pages:
            if ref not in session.leased:
                raise BadRequest(f"page {page_of(ref)} is not leased: it is in use already")
        for ref in pages:
            session.writing[ref] = session.leased.pop(ref)

    def fork(
        self,
        session: Session,
        refs: bytes,
        num_tokens: int,
        count: int,
        number: int | None,
        now: float,
    ) -> bytes:
        """`count` more sequences with the same `num_tokens` tokens in the pages `refs`: one hold
        more for each on the full pages, and for each a new page in place of the last one, if that
        is not full: copy it there. Returns the new pages, which may be none."""
        self.live(session)
        pages = len(refs) // REF_BYTES
        if not 0 < count <= MAX_FORKS:
            raise BadRequest(f"fork into {count} more: must be from 1 to {MAX_FORKS} at once")
        if not 0 < num_tokens <= pages * self.page_size or pages > -(-num_tokens // self.page_size):
            raise BadRequest(
                f"fork of {num_tokens} tokens in {pages} pages of {self.page_size}: name exactly "
                "the pages that hold them"
            )
        self.check_held(session, refs)
        full = num_tokens // self.page_size
        copies = count if pages > full else 0
        request = None if number is None else self.queue.get(session, number)
        if copies:
            self._may_take(session, copies, number)
        elif request is not None:
            self.announcements.stop_waiting(request)
            self.queue.served(request)
        for _ in range(count):
            self._share(session, self.tree.pieces(refs[: full * REF_BYTES]))
        self.counters.copied_pages += copies
        return self.take(session, copies, now)

    def fork_pages(
        self, session: Session, shared: bytes, own: int, numbers: list[int | None], now: float
    ) -> bytes:
        """One hold more on the shared pages, and `own` new pages, for each of the requests: all,
        or NoPages and none."""
        if not 0 < len(numbers) <= MAX_FORKS:
            raise BadRequest(
                f"fork into {len(numbers)} more: must be from 1 to {MAX_FORKS} at once"
            )
        requests = [self.queue.get(session, n) for n in numbers if n is not None]
        self.check_held(session, shared)
        if own:
            self._may_take(session, own * len(numbers), numbers[0])
        for request in requests:
            self.announcements.stop_waiting(request)
            self.queue.served(request)
        for _ in numbers:
            self._share(session, self.tree.pieces(shared))
        return self.take(session, own * len(numbers), now)

    def make_writable(self, session: Session, ref: int, number: int | None, now: float) -> int:
        """A page to write in the place of `ref`: that page itself if it is the caller's alone and
        not sealed; else a new one, to copy it into and to free `ref` (copy-on-write)."""
        self.live(session)
        packed = ref.to_bytes(REF_BYTES, "little", signed=True)
        self.check_held(session, packed)
        if session.writing.get(ref) == 1:
            return ref
        if ref in session.leased:
            raise BadRequest(f"page {page_of(ref)} is leased: say that it is in use first")
        self._may_take(session, 1, number)
        self.counters.copied_pages += 1
        return ref_at(self.take(session, 1, now), 0)

    def seal_tail(self, session: Session, ref: int, num_tokens: int) -> None:
        """A page that is not full becomes immutable with its first `num_tokens` tokens. It is not
        matchable; others get it by `hand_over`, and copy it to go on."""
        self.live(session)
        packed = ref.to_bytes(REF_BYTES, "little", signed=True)
        self.check_held(session, packed)
        if ref not in session.writing:
            raise BadRequest(f"page {page_of(ref)} is not being written: nothing to seal")
        if not 0 < num_tokens < self.page_size:
            raise BadRequest(
                f"a tail of {num_tokens} tokens: must be from 1 to {self.page_size - 1}; a full "
                "page is published"
            )
        self.seal(session, ref, num_tokens)

    def evict(self, num_pages: int, now: float) -> int:
        """Make up to that many pages free that nobody holds; returns how many."""
        count = min(num_pages, self.tree.num_evictable)
        self.free_list.put(self.tree.evict(count, now))
        return count

    # --- time

    def tick(self, now: float) -> None:
        """To be called about twice a second."""
        self.queue.tick(now)
        self.announcements.tick(now)
        self.handover.tick(now)
        self.operator.tick(now)

    def sweep(self, now: float) -> bool:
        """One portion of what may be put off, some hundred microseconds; is there more?"""
        if not self.has_chores(now):
            return False
        self.num_changes += 1
        if self._sweep_dead(now):
            return True
        if self.tree.has_doomed:
            self.free_list.put(self.tree.sweep(SWEEP_NODES, now))
        self.tree.expire(now, SWEEP_NODES)
        return self.has_chores(now)

    def has_chores(self, now: float) -> bool:
        return bool(self._dead) or self.tree.has_doomed or self.tree.has_expired(now)
