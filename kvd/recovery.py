"""What comes back after a restart of the daemon, and who gets what of it.

    records ──scan──► trees, held by the session "recovery" ◄──declare── sessions that resume
            └───────► pages that somebody may be reading or writing: quarantined

Nothing that was in use before is given away until everybody who used it has resumed and said what
it holds, is proven dead, or has been fenced: told, in memory that it maps, that what it reads is
not to be used. The fence is stored before the first page goes.
"""

from __future__ import annotations

import gc
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np

from kvd.cache import CacheManager
from kvd.metadata import LIVE, SessionEntry
from kvd.metadata.failpoints import FAILPOINTS
from kvd.metadata.page_states import OUTSIDE
from kvd.metadata.scan import Scan, scan
from kvd.rebuilding import Pages, rebuild
from kvd.session import Session
from kvd.tree_reading import Span
from kvd_shared.errors import BadRequest, SessionEnded
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES

RECOVERY = -(1 << 31)  # id of the session that holds everything; below those of tickets
GRACE_S = 5.0
MAX_HOLDS = 1 << 20  # of one session on one page


@dataclass(frozen=True, slots=True)
class Report:
    """For the log. Pages, but for `sessions`."""

    matchable: int
    quarantined: int
    private: int
    free: int
    sessions: int
    dropped: dict[str, int]  # of those that were in the tree, why


class Recovery:
    """Invariants: every session that the metadata lists is in exactly one of `waiting`,
    `declaring`, `ended` and the ones that have resumed; until `over`, the recovery session holds
    every page that came back and is nobody's own once."""

    def __init__(self, cache: CacheManager, found: Scan, now: float, grace_s: float) -> None:
        """Use `recover`."""
        self._cache = cache
        self.session = cache.open_session(RECOVERY, "recovery", now)
        self.over = False
        self.grace_until_s = now + grace_s
        self.waiting: dict[int, SessionEntry] = {}  # may resume
        self.ended: dict[int, SessionEntry] = {}  # await the proof of their death
        self.declaring: dict[Session, set[int]] = {}  # what of its own pages it has declared
        for session_id, entry in found.sessions.items():
            session = cache.open_session(session_id, entry.process.name, now)
            session.ended = True  # until it resumes
            for ref in self._refs(found.private.get(session_id)):
                session.writing[ref] = 1
            (self.waiting if entry.state == LIVE else self.ended)[session_id] = entry
        lost = rebuild(cache.tree, found, self.session)
        self._quarantine(np.concatenate([found.quarantined, lost]), found.tails)
        cache.versions.restore(found.weights)
        cache.free_list.restore(cache.meta.pages.current[found.free])
        self._tell_metadata(np.concatenate([found.quarantined, lost]))
        if len(lost):
            found.dropped["claimed_twice"] += len(lost)
        self.report = Report(
            cache.tree.num_pages,
            len(found.quarantined) + len(lost),
            sum(map(len, found.private.values())),
            len(found.free),
            len(found.sessions),
            dict(+Counter(found.dropped)),
        )

    # --- who comes back

    def resume(self, session_id: int) -> Session:
        """The process is the one that the entry names. It now declares what it holds, and asks for
        nothing else before it is done. Raises SessionEnded."""
        entry = self.waiting.pop(session_id, None)
        if entry is None:
            raise SessionEnded(f"session {session_id} cannot be resumed: attach again")
        session = self._cache.sessions[session_id]
        session.ended = False
        self.declaring[session] = set()
        return session

    def is_declaring(self, session: Session) -> bool:
        return session in self.declaring

    def declare(
        self, session: Session, refs: bytes, counts: bytes, done: bool, now: float
    ) -> bytes:
        """The session holds these pages, so often each (int32). Returns those that it cannot have:
        free by now, of another generation, or another's own. With `done`, its own pages that it
        did not declare go free.

        Its own pages all count as being written afterwards, leased ones too.
        """
        self._cache.live(session)
        mine = self.declaring.get(session)
        if mine is None:
            raise BadRequest(f"session {session.id} is not resuming: nothing to declare")
        pages, times = _columns(refs, counts)
        refused, at = array("q"), 0
        while at < len(pages):
            ref, count = pages[at], times[at]
            span = self._cache.tree.span_at(refs, at)
            if span is not None:
                stop = at + 1
                while stop < at + span.stop - span.start and times[stop] == count:
                    stop += 1
                self._hold(Span(span.node, span.start, span.start + stop - at), session, count)
                at = stop
                continue
            if ref in session.writing:
                session.writing[ref] += count if ref in mine else count - 1
                mine.add(ref)
            elif ref in self._cache.sealed:
                tokens, holds = self._cache.sealed[ref]
                self._cache.sealed[ref] = tokens, holds + count
                session.sealed[ref] = session.sealed.get(ref, 0) + count
            else:
                refused.append(ref)
            at += 1
        if done:
            del self.declaring[session]
            left = [ref for ref in session.writing if ref not in mine]
            for ref in left:
                del session.writing[ref]
            self._cache.put(left)
            self._let_go()
        return refused.tobytes()

    def dead(self, session: Session, now: float) -> None:
        """Its process is proven dead: what it has comes back."""
        self.waiting.pop(session.id, None)
        self.ended.pop(session.id, None)
        self.declaring.pop(session, None)
        self._cache.meta.sessions.ended(session.id)
        self._cache.release_session(session)
        self._let_go()

    # --- time

    def tick(self, now: float) -> list[int]:
        """To be called about twice a second until it is over; returns who has been fenced."""
        if self.over:
            return []
        fenced = self._fence() if now >= self.grace_until_s else []
        self._let_go()
        return fenced

    def end_grace(self, now: float) -> list[int]:
        """Whoever has not resumed by now is fenced."""
        self.grace_until_s = now
        return self.tick(now)

    # --- how

    def _let_go(self) -> None:
        """Of what nobody waits for any more, once that is so."""
        if self.over or self.waiting or not all(session.ended for session in self.declaring):
            return
        self.declaring.clear()
        self.over = True
        self._cache.end_session(self.session)
        self._cache.bury(self.session)

    def _fence(self) -> list[int]:
        fenced = list(self.waiting)
        self.ended.update(self.waiting)
        self.waiting.clear()
        for session in self.declaring:
            if not session.ended:
                self._cache.end_session(session)
                fenced.append(session.id)
        for session_id in fenced:
            self._cache.meta.sessions.fenced(session_id)
        return fenced

    def _hold(self, span: Span, session: Session, count: int) -> None:
        node = self._cache.tree.hold(span, session, join=False)
        node.holders[session] += count - 1
        self._cache.tree.num_holds += (count - 1) * node.num_pages

    def _quarantine(self, pages: Pages, tails: dict[int, int]) -> None:
        """0 tokens: it is not known, and the page is never published again."""
        for page, ref in zip(pages.tolist(), self._refs(pages), strict=True):
            self._cache.sealed[ref] = tails.get(page, 0), 1
            self.session.sealed[ref] = 1

    def _refs(self, pages: Pages | None) -> list[int]:
        if pages is None:
            return []
        refs: list[int] = self._cache.meta.pages.current[pages].tolist()
        return refs

    def _tell_metadata(self, quarantined: Pages) -> None:
        """What was dropped is dropped for good."""
        meta = self._cache.meta
        if FAILPOINTS.armed:
            FAILPOINTS.hit("recovered.before_owners")
        if len(quarantined):
            meta.pages.set_owner(meta.pages.current[quarantined].tobytes(), OUTSIDE)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("recovered.before_roots")
        live = {root.id for root in self._cache.tree.roots.values()}
        for root_id in meta.roots.ids() - live:
            meta.roots.dead(root_id)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("recovered.done")


def recover(cache: CacheManager, now: float, grace_s: float = GRACE_S) -> Recovery:
    """Bring back into a new cache what its metadata says of the one before. `now`: of the clock by
    which pages were published, time.monotonic(); the order of last use is that of publication, and
    holds, tickets, requests and the operators' retains are forgotten.

    Raises ColdStart; neither the cache nor its metadata are to be used then.
    """

    def ttl_of(namespace: Namespace) -> float | None:
        return cache.tree.eviction.tenant_of(namespace).ttl_s

    collects = gc.isenabled()
    gc.disable()  # all that is made here stays: looking through it takes longer than making it
    try:
        return Recovery(cache, scan(cache.meta, now, ttl_of), now, grace_s)
    finally:
        if collects:
            gc.enable()


def _columns(refs: bytes, counts: bytes) -> tuple[array[int], array[int]]:
    """Raises BadRequest unless they fit each other."""
    if len(refs) % REF_BYTES or len(counts) != len(refs) // REF_BYTES * 4:
        raise BadRequest(
            f"declare of {len(refs)} bytes of references and {len(counts)} bytes of counts: "
            "8 and 4 bytes a page, in the same order"
        )
    pages, times = array("q", refs), array("i", counts)
    if len(set(pages)) != len(pages):
        raise BadRequest("declare: a page is named twice: say how often it is held instead")
    for count in times:
        if not 0 < count <= MAX_HOLDS:
            raise BadRequest(f"declare: a count of {count} holds: must be from 1 to {MAX_HOLDS}")
    return pages, times
