"""Server-side sequences: after the first call only new tokens travel, for many sequences at once.

```
tokens  [0 ............................ num_tokens)            tail: those from num_published on
computed[0 .................. num_computed)
pages   [ in the tree, held )[ full )[ filling )[ leased ahead )
        0        num_published                 used          len(refs)
```
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvd.results import Match
from kvd.session import Session
from kvd_shared.errors import (
    BadRequest,
    Detached,
    KvdError,
    NoPages,
    NotHeld,
    OverLimit,
    StaleVersion,
    UnknownHandle,
)
from kvd_shared.layout import pages_needed
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES

if TYPE_CHECKING:
    from kvd.cache import CacheManager

MAX_AHEAD = 64  # pages
# What became of a row of `extend`, by its number on the wire.
STATUSES = ("OK", "NO_PAGES", "UNKNOWN_HANDLE", "BAD_REQUEST", "STALE_VERSION", "DETACHED")
OK, NO_PAGES, UNKNOWN, BAD, STALE, DETACHED = range(len(STATUSES))


class CacheSequence:
    """Invariants: the picture above; the session holds every page of `refs` once for this sequence,
    and those of `spare` (duplicates that its worker may still be reading) once more."""

    __slots__ = (
        "ahead",
        "handle",
        "namespace",
        "num_computed",
        "num_published",
        "num_tokens",
        "number",
        "publishes",
        "refs",
        "session",
        "spare",
        "tail",
        "used",
    )

    def __init__(
        self,
        handle: int,
        session: Session,
        namespace: Namespace,
        number: int | None,
        ahead: int,
    ) -> None:
        self.handle = handle
        self.session = session
        self.namespace = namespace
        self.number = number
        self.ahead = ahead  # pages to lease ahead of need
        self.tail = bytearray()
        self.num_tokens = 0
        self.num_computed = 0
        self.num_published = 0  # pages
        self.used = 0  # pages that its tokens need
        self.refs = array("q")
        self.spare = array("q")
        self.publishes = True  # until its namespace is flushed, or its weights version too old

    def num_unused_slots(self, page_size: int) -> int:
        """Its waste: slots of its pages that no token of it has."""
        return len(self.refs) * page_size - self.num_tokens


@dataclass(slots=True)
class Extended:
    """Column by column, one entry a row: what became of it, and how many new pages it got. `refs`
    are the new pages of all rows in order. Swaps: in the row's block table, at that place, the
    named page has to stand instead; the one before is freed with the row's next `extend`."""

    status: bytearray = field(default_factory=bytearray)
    num_new: array[int] = field(default_factory=lambda: array("i"))
    refs: array[int] = field(default_factory=lambda: array("q"))
    swap_rows: array[int] = field(default_factory=lambda: array("i"))
    swap_places: array[int] = field(default_factory=lambda: array("i"))
    swap_refs: array[int] = field(default_factory=lambda: array("q"))

    def append(self, more: Extended, first_row: int) -> None:
        """The rows that follow, of which the first is this one."""
        self.status += more.status
        self.num_new += more.num_new
        self.refs += more.refs
        self.swap_rows.extend([row + first_row for row in more.swap_rows])
        self.swap_places += more.swap_places
        self.swap_refs += more.swap_refs


class Sequences:
    """The sequences of one pool's sessions, by handle. Handles are never used twice."""

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._next = 1

    def open(
        self,
        session: Session,
        namespace: Namespace,
        tokens: bytes,
        number: int | None,
        ahead: int,
        now: float,
        min_partial: int | None = None,
        announce: bool = False,
        own_rate: float | None = None,
    ) -> tuple[int, Match]:
        """`acquire` for the tokens' pages and `ahead` more, and a handle for what follows; 0 if the
        request waits instead."""
        if not 0 <= ahead <= MAX_AHEAD:
            raise BadRequest(f"ahead = {ahead} pages: must be from 0 to {MAX_AHEAD}")
        cache = self._cache
        most = cache.options.limits.max_requests_a_session
        if len(session.sequences) >= most:
            raise OverLimit(
                f"session {session.id} has {most} sequences open, as many as it may "
                "(limits.max_requests_a_session): close some first",
                limit="max_requests_a_session",
                value=most + 1,
                most=most,
            )
        num_tokens = len(tokens) // TOKEN_BYTES
        need = pages_needed(num_tokens, cache.page_size)
        found = cache.acquire(
            session, namespace, tokens, need + ahead, number, now, min_partial, announce, own_rate
        )
        if found.stop == "pending":
            return 0, found
        sequence = self._new(session, namespace, number, ahead)
        sequence.refs.frombytes(found.refs)
        for ref in sequence.refs[need:]:
            session.leased[ref] = session.writing.pop(ref)
        sequence.num_tokens = num_tokens
        sequence.num_computed = found.matched_tokens
        sequence.num_published = found.num_matched_pages
        sequence.used = need
        sequence.tail += tokens[found.matched_tokens * TOKEN_BYTES :]
        return sequence.handle, found

    def extend(
        self,
        session: Session,
        handles: array[int],
        computed: array[int],
        counts: array[int],
        tokens: bytes,
        now: float,
    ) -> Extended:
        """For each sequence: its first `computed` tokens are computed now, and `counts` new tokens
        follow (the rows' tokens are one behind the other). Publishes what is full, gives the pages
        that the tokens need, and leases ahead. Each row is done or refused by itself; a row that
        gets NO_PAGES has its tokens and is repeated without."""
        cache = self._cache
        cache.live(session)
        check_rows(handles, computed, counts, tokens)
        done, at, page_size = Extended(), 0, cache.page_size
        known = session.sequences
        status, num_new = done.status, done.num_new
        for row, handle in enumerate(handles):
            count, first = counts[row], at
            at += count * TOKEN_BYTES
            sequence = known.get(handle)
            if sequence is None:
                status.append(UNKNOWN)
                num_new.append(0)
                continue
            most = sequence.used * page_size  # tokens that have a place
            if not sequence.num_computed <= computed[row] <= sequence.num_tokens or (
                computed[row] > most
            ):
                status.append(BAD)
                num_new.append(0)
                continue
            num_tokens = sequence.num_tokens + count
            if not (
                sequence.spare
                or computed[row] // page_size > sequence.num_published
                or num_tokens > sequence.used * page_size
            ):  # as nearly always: no page is full, and none is needed
                sequence.tail += tokens[first:at]
                sequence.num_tokens, sequence.num_computed = num_tokens, computed[row]
                status.append(OK)
                num_new.append(0)
                continue
            before = len(done.refs)
            try:
                state = self._extend(sequence, computed[row], tokens[first:at], row, done, now)
            except KvdError:  # its pages were freed behind its back
                state = BAD
            status.append(state)
            num_new.append(len(done.refs) - before)
        return done

    def fork(
        self,
        session: Session,
        handle: int,
        numbers: list[int | None],
        now: float,
    ) -> tuple[list[int], bytes, int | None]:
        """One more sequence for each of the request numbers, with the same tokens. Returns their
        handles; the pages in which they differ from the first, as many for each; and, if its last
        computed page is not full, that page: its copy is to be put into the first of them."""
        cache = self._cache
        cache.live(session)
        sequence = self.get(session, handle)
        full = sequence.num_computed // cache.page_size
        own = len(sequence.refs) - full
        shared = sequence.refs[:full].tobytes()
        new = cache.fork_pages(session, shared, own, numbers, now)
        handles = []
        for i, number in enumerate(numbers):
            one = self._new(session, sequence.namespace, number, sequence.ahead)
            one.refs.frombytes(shared)
            one.refs.frombytes(new[i * own * REF_BYTES : (i + 1) * own * REF_BYTES])
            for ref in one.refs[sequence.used :]:
                session.leased[ref] = session.writing.pop(ref)
            one.tail += sequence.tail
            for name in ("num_tokens", "num_computed", "num_published", "used", "publishes"):
                setattr(one, name, getattr(sequence, name))
            handles.append(one.handle)
        copied = sequence.num_computed % cache.page_size > 0
        source = sequence.refs[full] if copied else None
        cache.counters.copied_pages += len(numbers) if copied else 0
        return handles, new, source

    def close(self, session: Session, handles: array[int], now: float) -> None:
        """The sequences are over, or yield: their pages are freed; what is full of them has been
        published. Raises UnknownHandle if one is not open, and closes none."""
        self._cache.live(session)
        sequences = [self.get(session, handle) for handle in handles]
        if len(set(handles)) != len(handles):
            raise BadRequest("close: a handle is named twice")
        for sequence in sequences:
            del session.sequences[sequence.handle]
            try:
                self._cache.free(session, (sequence.refs + sequence.spare).tobytes(), now)
            except KvdError:  # some were freed behind its back: what it has left
                for ref in sequence.refs + sequence.spare:
                    with suppress(NotHeld):
                        self._cache.free(session, ref.to_bytes(REF_BYTES, "little"), now)

    def get(self, session: Session, handle: int) -> CacheSequence:
        sequence = session.sequences.get(handle)
        if sequence is None:
            raise UnknownHandle(f"session {session.id} has no open sequence {handle}")
        return sequence

    # --- how

    def _extend(
        self,
        sequence: CacheSequence,
        computed: int,
        tokens: bytes,
        row: int,
        done: Extended,
        now: float,
    ) -> int:
        page_size = self._cache.page_size
        if sequence.spare:
            self._cache.free(sequence.session, sequence.spare.tobytes(), now)
            del sequence.spare[:]
        sequence.tail += tokens
        sequence.num_tokens += len(tokens) // TOKEN_BYTES
        sequence.num_computed = computed
        state = OK
        if computed // page_size > sequence.num_published and sequence.publishes:
            state = self._publish(sequence, row, done, now)
        if sequence.num_tokens > sequence.used * page_size and not self._grow(
            sequence, done.refs, now
        ):
            state = NO_PAGES
        return state

    def _new(
        self, session: Session, namespace: Namespace, number: int | None, ahead: int
    ) -> CacheSequence:
        sequence = CacheSequence(self._next, session, namespace, number, ahead)
        self._next += 1
        session.sequences[sequence.handle] = sequence
        return sequence

    def _publish(self, sequence: CacheSequence, row: int, done: Extended, now: float) -> int:
        cache, session, refs = self._cache, sequence.session, sequence.refs
        start, stop = sequence.num_published, sequence.num_computed // cache.page_size
        if stop <= start:
            return OK
        token_bytes = (stop - start) * cache.page_size * TOKEN_BYTES
        mine = refs[start:stop].tobytes()
        try:
            published = cache.publish(
                session,
                sequence.namespace,
                bytes(sequence.tail[:token_bytes]),
                mine,
                refs[start - 1] if start else None,
                now,
            )
        except (StaleVersion, Detached) as e:
            sequence.publishes = False
            return STALE if isinstance(e, StaleVersion) else DETACHED
        sequence.num_published = stop
        del sequence.tail[:token_bytes]
        if published.num_duplicates:
            canonical = array("q", published.refs)
            for i, ref in enumerate(canonical, start=start):
                if refs[i] != ref:
                    sequence.spare.append(refs[i])
                    refs[i] = ref
                    done.swap_rows.append(row)
                    done.swap_places.append(i)
                    done.swap_refs.append(ref)
        return OK

    def _grow(self, sequence: CacheSequence, new: array[int], now: float) -> bool:
        """The pages that the tokens need, and then those ahead, if they can be had."""
        cache, session = self._cache, sequence.session
        need = pages_needed(sequence.num_tokens, cache.page_size)
        missing = need - len(sequence.refs)
        if missing > 0:
            try:
                refs = array("q", cache.allocate(session, missing, sequence.number, now))
            except (NoPages, OverLimit):
                return False
            sequence.refs += refs
            new += refs
        for ref in sequence.refs[sequence.used : need]:
            count = session.leased.pop(ref, 0)
            if count:
                session.writing[ref] = count
        sequence.used = need
        missing = need + sequence.ahead - len(sequence.refs)
        if missing > 0 and cache.has_room(sequence.number, session, missing):
            refs = array("q", cache.take_ahead(session, missing, now))
            cache.counters.allocated_pages += missing
            sequence.refs += refs
            new += refs
        return True


def check_rows(
    handles: array[int], computed: array[int], counts: array[int], tokens: bytes
) -> None:
    """Raises BadRequest unless the columns of an `extend` fit each other."""
    if not len(handles) == len(computed) == len(counts):
        raise BadRequest(
            f"extend of {len(handles)} sequences with {len(computed)} computed counts and "
            f"{len(counts)} counts of tokens: they must be as many"
        )
    if min(counts, default=0) < 0 or sum(counts) * TOKEN_BYTES != len(tokens):
        raise BadRequest(
            f"extend: counts of {sum(counts)} tokens in all (none negative), and "
            f"{len(tokens) // TOKEN_BYTES} tokens: they must be as many"
        )
