"""What the cache core promises about publishing, matching and waiting, said again page by page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvd.retention import NO_WISH, Retention
from kvd_shared.errors import (
    BadRequest,
    Detached,
    NotHeld,
    OverLimit,
    StaleVersion,
)
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES
from tests.kvd.reference_pages import Page
from tests.kvd.reference_queue import Request
from tests.kvd.reference_sessions import ModelSession, ReferenceSessions
from tests.kvd.reference_waits import Pending


@dataclass
class Found:
    """What a match is to give; `partial` are the pages that may be the partial one."""

    refs: list[int]
    stop: str
    partial: list[Page] = field(default_factory=list)
    partial_tokens: int = 0
    pending: Pending | None = None


class ReferenceModel(ReferenceSessions):
    # --- publishing

    def keys(self, tokens: bytes) -> list[bytes]:
        step = self.page_bytes
        return [tokens[i : i + step] for i in range(0, len(tokens) - step + 1, step)]

    def stale(self, namespace: Namespace) -> bool:
        of_all = self.minimum.get(None, 0)
        return namespace.weights_version < max(of_all, self.minimum.get(namespace.model, 0))

    def publish(
        self, session: ModelSession, namespace: Namespace, tokens: bytes, refs: list[int],
        after: int | None, now: float, retention: Retention = NO_WISH,
    ) -> list[int]:  # fmt: skip
        self.live(session)
        if not refs or len(tokens) != len(refs) * self.page_bytes:
            raise BadRequest("")
        keys, above = self.keys(tokens), None
        if after is None:
            if self.stale(namespace):
                raise StaleVersion("")
        else:
            if not session.cached.get(after):
                raise BadRequest("") if after in session.held else NotHeld("")
            above = self.tree.pages[after]
            if above.namespace != namespace:
                raise BadRequest("")
            if above.gone_for:
                raise StaleVersion("") if self.stale(namespace) else Detached("")
        known = self.known(namespace, above, keys, now)
        differ = [i for i, page in enumerate(known) if page.ref != refs[i]]
        self.must_be_publishable(session, refs, known, differ)
        self.hold_cached(session, [known[i] for i in differ])
        for i in differ:
            if refs[i] in session.writing:
                self.seal(session, refs[i], self.page_size)
        above = known[-1] if known else above
        for key, ref in list(zip(keys, refs, strict=True))[len(known) :]:
            place = session.place_of(ref)
            count = place.pop(ref)
            self.tails.pop(ref, None)
            number = session.number
            above = self.tree.insert(namespace, above, key, ref, number, count, retention)
            session.cached[ref] += count
        self.tree.now = now
        if len(known) < len(refs) and above is not None:
            self.tree.evict_over_share(above.tenant)
        self.counted["published_pages"] += len(refs) - len(known)
        self.counted["duplicate_pages"] += len(differ)
        self.note_progress(session, namespace, (known[0] if known else None), refs[0], now)
        return [page.ref for page in known] + refs[len(known) :]

    def known(
        self, namespace: Namespace, above: Page | None, keys: list[bytes], now: float
    ) -> list[Page]:
        if above is None:
            return self.tree.walk(namespace, keys, now)
        found: list[Page] = []
        for key in keys:
            page = above.children.get(key)
            if page is None or not page.matchable(now):
                break
            found.append(page)
            above = page
        return found

    def must_be_publishable(
        self, session: ModelSession, refs: list[int], known: list[Page], differ: list[int]
    ) -> None:
        new = refs[len(known) :]
        own = [refs[i] for i in differ] + new
        if len(set(own)) != len(own):
            raise BadRequest("")
        for ref in own:
            if ref not in session.writing and ref not in session.sealed:
                if ref in session.leased or ref in self.tree.pages:
                    raise BadRequest("")
                raise NotHeld("")
        for ref in new:
            others = sum(s.sealed[ref] for s in self.sessions.values() if s is not session)
            if ref in session.sealed and (others or self.tails[ref] != self.page_size):
                raise BadRequest("")
        same = [page.ref for i, page in enumerate(known) if i not in differ]
        self.must_hold(session, same)

    def retain(self, session: ModelSession, refs: list[int], retention: Retention) -> None:
        self.live(session)
        self.must_hold(session, refs)
        if any(ref not in session.cached for ref in refs):
            raise BadRequest("")
        for ref in refs:
            self.tree.retain(self.tree.pages[ref], retention)

    def note_progress(
        self, session: ModelSession, namespace: Namespace, first: Page | None, ref: int, now: float
    ) -> None:
        """Whoever waits for what this session announced is told."""
        page = first or self.tree.pages.get(ref)
        for one in self.waits.of_session(session.number):
            if page is None or one.namespace != namespace or page.depth > one.done_pages:
                continue
            cached = len(self.tree.walk(namespace, self.keys(one.tokens), now))
            self.waits.published(one, cached, now)

    # --- matching

    def walk(self, namespace: Namespace, tokens: bytes, now: float) -> list[Page]:
        num_tokens = len(tokens) // TOKEN_BYTES
        if num_tokens < 1:
            raise BadRequest("")
        if num_tokens > self.limits.max_prompt_tokens:
            raise OverLimit("")
        return self.tree.walk(namespace, self.keys(tokens[:-TOKEN_BYTES]), now)

    def partial(
        self, namespace: Namespace, found: list[Page], tokens: bytes, least: int | None, now: float
    ) -> tuple[list[Page], int]:
        """All pages that continue the prefix with the most tokens, by looking at each."""
        if least is None:
            return [], 0
        if not 1 <= least < self.page_size:
            raise BadRequest("")
        rest = tokens[len(found) * self.page_bytes : -TOKEN_BYTES]
        siblings = found[-1].children if found else self.tree.roots.get(namespace, {})
        best: tuple[list[Page], int] = [], least
        for page in siblings.values():
            same = num_common(page.place[1], rest) if page.matchable(now) else 0
            if same >= best[1]:
                best = ([*best[0], page] if same == best[1] else [page]), same
        return best if best[0] else ([], 0)

    def match(
        self, session: ModelSession, namespace: Namespace, tokens: bytes, now: float,
        least: int | None, chosen: int | None,
    ) -> Found:  # fmt: skip
        """`chosen`: the partial page, where several are as good."""
        self.live(session)
        found = self.walk(namespace, tokens, now)
        partial, same = self.partial(namespace, found, tokens, least, now)
        self.must_have_room(session, len(found) + bool(partial))
        return self.hold_match(session, namespace, tokens, found, partial, same, now, chosen)

    def hold_match(
        self, session: ModelSession, namespace: Namespace, tokens: bytes, found: list[Page],
        partial: list[Page], same: int, now: float, chosen: int | None,
    ) -> Found:  # fmt: skip
        self.counted["tokens_asked"] += len(tokens) // TOKEN_BYTES
        self.counted["tokens_matched"] += len(found) * self.page_size
        own = sum(page.publisher == session.number for page in found)
        self.counted["tokens_matched_own"] += own * self.page_size
        self.hold_cached(session, found)
        if partial:
            self.counted["tokens_partial"] += same
            assert chosen in [page.ref for page in partial], "not the best partial page"
            self.hold_cached(session, [page for page in partial if page.ref == chosen])
        most = self.max_pages(tokens)
        stop = "stale_version" if self.stale(namespace) else "not_cached"
        stop = "limit" if len(found) == most else stop
        pending = None
        if stop == "not_cached":
            pending = self.waits.pending(namespace, tokens, most, len(found), now, None)
        return Found([p.ref for p in found], stop, partial, same if partial else 0, pending)

    def max_pages(self, tokens: bytes) -> int:
        return (len(tokens) // TOKEN_BYTES - 1) // self.page_size

    def acquire(
        self, session: ModelSession, namespace: Namespace, tokens: bytes, num_pages: int,
        number: int | None, now: float, least: int | None, announce: bool, rate: float | None,
        new: list[int], chosen: int | None, to_lease: int = 0,
    ) -> Found:  # fmt: skip
        self.live(session)
        self.must_count(num_pages)
        request = self.request(session, number)
        if request is None and (announce or rate is not None):
            raise BadRequest("")
        found = self.walk(namespace, tokens, now)
        partial, same = self.partial(namespace, found, tokens, least, now)
        missing = max(0, num_pages - len(found))
        self.must_have_room(session, missing + len(found))
        if rate is not None and request is not None:
            pending = self.wait(request, namespace, tokens, len(found), rate, now)
            if pending is not None:
                return Found([], "pending", pending=pending)
        wanted = missing + sum(not page.cover for page in found)
        partial = self.fitting(session, request, partial, missing, wanted, len(found), chosen)
        self.admit(request, wanted + sum(not page.cover for page in partial[:1]))
        result = self.hold_match(session, namespace, tokens, found, partial, same, now, chosen)
        if announce and request is not None:
            self.announce(request, namespace, tokens, len(found), now)
        self.counted["allocated_pages"] += missing
        to_write = missing - to_lease
        self.take(missing, new, Counter(), now)
        session.writing.update(new[:to_write])
        session.leased.update(new[to_write:])
        result.refs += new
        return result

    def fitting(
        self, session: ModelSession, request: Request | None, partial: list[Page], missing: int,
        wanted: int, found: int, chosen: int | None,
    ) -> list[Page]:  # fmt: skip
        """The partial page, if it can be held as well. Of several that are as good the core may
        have chosen one that can not."""
        most, available = self.limits.max_pages_a_session, self.available_to(request)
        if not missing or (most is not None and len(session.held) + missing + found >= most):
            return []
        fit = [page for page in partial if wanted + (not page.cover) <= available]
        if chosen is not None:
            return [page for page in fit if page.ref == chosen]
        return fit if len(fit) == len(partial) else []

    # --- announcing

    def announce(
        self, request: Request, namespace: Namespace, tokens: bytes, found: int, now: float
    ) -> None:
        """What could not be published is not announced."""
        if self.stale(namespace):
            self.waits.end(request)
        else:
            self.waits.announce(request, namespace, tokens, found, now)

    def flush(self, namespace: Namespace, reason: str) -> None:
        if namespace in self.tree.roots:
            self.tree.flush(namespace, reason)
            self.end_announcements([namespace])

    def raise_weights_version(self, model: str | None, version: int) -> None:
        before = max(self.minimum.get(None, 0), self.minimum.get(model, 0))
        if not before < version < 1 << 63:
            raise BadRequest("")
        self.minimum[model] = version
        announced = [a.namespace for a in self.waits.announced.values()]
        self.end_announcements([name for name in announced if self.stale(name)])
        for namespace in list(self.tree.roots):
            if self.stale(namespace):
                self.flush(namespace, "stale_version")

    def end_announcements(self, of: list[Namespace]) -> None:
        for one in list(self.waits.announced.values()):
            if one.namespace in of:
                self.waits.end(one.request)

    def wait(
        self, request: Request, namespace: Namespace, tokens: bytes, found: int, rate: float,
        now: float,
    ) -> Pending | None:  # fmt: skip
        if not rate > 0 or request.running:
            raise BadRequest("")
        self.waits.stop_waiting(request)
        most = self.max_pages(tokens)
        pending = self.waits.pending(namespace, tokens, most, found, now, request)
        if pending is None:
            return None
        own_s = (pending.num_pages - found) * self.page_size / rate
        if pending.seconds is not None and pending.seconds > own_s:
            return None
        self.waits.wait(request, pending)
        request.demand = 0  # what it was refused before, it does not want now
        return pending


def num_common(key: bytes, tokens: bytes) -> int:
    same = 0
    for at in range(0, min(len(key), len(tokens)), TOKEN_BYTES):
        if key[at : at + TOKEN_BYTES] != tokens[at : at + TOKEN_BYTES]:
            break
        same += 1
    return same
