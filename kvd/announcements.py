"""No prefix is computed twice at the same time: who computes what, and who waits for it.

A request that computes *announces* its tokens; another one that wants a part of them may *wait*
instead of computing it as well. Why no cycle of waiters can form:

1. Only a request that has pages of its own (it is running) can announce.
2. Only a request that has none (it is not running) can wait, and it waits without holding any.

So whoever is waited for waits for nobody. It may still be slow, or hang; a wait therefore ends with
the announcement, which ends when all is published, when its request ends, yields or is refused
pages, when its session ends, or when nothing has been published for too long (`stalled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvd.age_queue import Request
from kvd.prefix import common_units
from kvd_shared.errors import BadRequest
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES

STALL_S = 1.0  # at the least; a slow computer may take up to 4 of its own intervals,
FIRST_STALL_S = 10.0  # and this long for its first pages, before it has shown any pace
MAX_ANNOUNCED_BYTES = 64 << 20  # of a pool
MAX_WAITERS = 4096  # of one announcement


@dataclass(eq=False, slots=True)
class Announcement:
    """One request computes `tokens` (whole pages), of which `done_pages` are published."""

    request: Request
    namespace: Namespace
    tokens: bytes
    num_pages: int
    first_page: int  # what was cached when it began
    done_pages: int
    began_s: float
    progress_s: float
    interval_s: float = 0.0  # between the last two publications
    waiters: dict[int, Waiter] = field(default_factory=dict)  # by request number

    def rate(self, page_size: int) -> float | None:
        """Tokens published a second since it began; None while nothing is."""
        pages, seconds = self.done_pages - self.first_page, self.progress_s - self.began_s
        return pages * page_size / seconds if pages > 0 and seconds > 0 else None

    def stalled(self, now: float) -> bool:
        patience_s = max(STALL_S, 4 * self.interval_s) if self.interval_s else FIRST_STALL_S
        return now - self.progress_s > patience_s


@dataclass(eq=False, slots=True)
class Waiter:
    """A request that waits for the first `num_pages` of an announcement."""

    request: Request
    announcement: Announcement
    num_pages: int


@dataclass(frozen=True, slots=True)
class Pending:
    """What another request is computing of a prompt: its tokens up to `tokens` from the start will
    be cached in about `seconds` (None: its pace is not known yet)."""

    announcement: Announcement
    num_pages: int
    tokens: int
    seconds: float | None


class Announcements:
    """Invariants: a request announces at most one prefix and waits for at most one, never both;
    `_by_first_page` finds each announcement by the first page of its prompt; a waiter stands in its
    announcement's `waiters` and in `_waiting`.

    `tell(kind, request, tokens)` is called for each waiter: `progress` when more of what it waits
    for can be matched, `ready` when all of it can, `ended` when no more will come.
    """

    def __init__(self, page_size: int, tell: Callable[[str, Request, int], None]) -> None:
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._tell = tell
        self._by_request: dict[int, Announcement] = {}
        self._by_first_page: dict[tuple[Namespace, bytes], list[Announcement]] = {}
        self._waiting: dict[int, Waiter] = {}
        self.num_bytes = 0  # of the announced tokens
        self.waited = 0  # requests that have waited, in all

    def __len__(self) -> int:
        return len(self._by_request)

    def __iter__(self) -> Iterator[Announcement]:
        return iter(self._by_request.values())

    # --- who computes

    def announce(
        self, request: Request, namespace: Namespace, tokens: bytes, cached_pages: int, now: float
    ) -> bool:
        """The request computes the whole pages of `tokens` from `cached_pages` on. Replaces what
        it announced before. Returns whether there was room for it."""
        if not request.running:
            raise BadRequest(
                f"request {request.number} has no pages: only what is being computed can be "
                "announced; acquire or allocate first"
            )
        num_pages = len(tokens) // self._page_bytes
        before = self._by_request.get(request.number)
        num_bytes = self.num_bytes + len(tokens) - (len(before.tokens) if before else 0)
        if num_pages > cached_pages and num_bytes > MAX_ANNOUNCED_BYTES:
            return False
        self.end(request)
        if num_pages <= cached_pages:
            return True
        announcement = Announcement(
            request, namespace, tokens, num_pages, cached_pages, cached_pages, now, now
        )
        self._by_request[request.number] = announcement
        self._by_first_page.setdefault(self._key(announcement), []).append(announcement)
        self.num_bytes += len(tokens)
        return True

    def published(self, announcement: Announcement, done_pages: int, now: float) -> None:
        """Its first `done_pages` can be matched now."""
        if done_pages <= announcement.done_pages:
            return
        announcement.done_pages = done_pages
        announcement.interval_s = now - announcement.progress_s
        announcement.progress_s = now
        for waiter in list(announcement.waiters.values()):
            ready = done_pages >= waiter.num_pages
            tokens = min(done_pages, waiter.num_pages) * self._page_size
            if ready:
                self._forget(waiter)
            self._tell("ready" if ready else "progress", waiter.request, tokens)
        if done_pages >= announcement.num_pages:
            self.end(announcement.request)

    def end(self, request: Request) -> None:
        """The request computes no more: it is done, or over, or gave its pages back."""
        announcement = self._by_request.pop(request.number, None)
        if announcement is None:
            return
        self.num_bytes -= len(announcement.tokens)
        key = self._key(announcement)
        self._by_first_page[key].remove(announcement)
        if not self._by_first_page[key]:
            del self._by_first_page[key]
        for waiter in list(announcement.waiters.values()):
            self._forget(waiter)
            self._tell("ended", waiter.request, announcement.done_pages * self._page_size)

    def of_session(self, request_session: object) -> list[Announcement]:
        return [a for a in self._by_request.values() if a.request.session is request_session]

    # --- who waits

    def pending(
        self,
        namespace: Namespace,
        tokens: bytes,
        max_pages: int,
        cached_pages: int,
        now: float,
        but: Request | None = None,
    ) -> Pending | None:
        """The announcement that covers most of the prompt's first `max_pages` beyond what is
        cached; not one of `but`, which asks, and none that has stalled."""
        best: Announcement | None = None
        most = cached_pages
        key = (namespace, tokens[: self._page_bytes])
        for announcement in self._by_first_page.get(key, ()):
            if announcement.request is but or announcement.stalled(now):
                continue
            limit = min(max_pages, announcement.num_pages)
            same = common_units(announcement.tokens, 0, tokens, 0, limit, self._page_bytes)
            if same > max(most, announcement.done_pages):
                best, most = announcement, same
        if best is None:
            return None
        rate = best.rate(self._page_size)
        tokens_left = (most - best.done_pages) * self._page_size
        return Pending(best, most, most * self._page_size, tokens_left / rate if rate else None)

    def wait(self, request: Request, pending: Pending) -> bool:
        """Whether the request now waits; not if too many do."""
        if request.running:
            raise BadRequest(
                f"request {request.number} has pages: only one that holds none may wait; free "
                "them and say yielded first"
            )
        announcement = pending.announcement
        self.stop_waiting(request)
        if len(announcement.waiters) >= MAX_WAITERS:
            return False
        waiter = Waiter(request, announcement, pending.num_pages)
        announcement.waiters[request.number] = self._waiting[request.number] = waiter
        self.waited += 1
        return True

    def stop_waiting(self, request: Request) -> None:
        waiter = self._waiting.get(request.number)
        if waiter is not None:
            self._forget(waiter)

    def tick(self, now: float) -> None:
        """To be called now and then: whoever computes nothing any more is not waited for."""
        for announcement in list(self._by_request.values()):
            if announcement.waiters and announcement.stalled(now):
                self.end(announcement.request)

    # --- how

    def _key(self, announcement: Announcement) -> tuple[Namespace, bytes]:
        return announcement.namespace, announcement.tokens[: self._page_bytes]

    def _forget(self, waiter: Waiter) -> None:
        del waiter.announcement.waiters[waiter.request.number]
        del self._waiting[waiter.request.number]

    def check(self) -> None:
        for number, announcement in self._by_request.items():
            assert announcement.request.number == number and announcement.request.running
            assert announcement in self._by_first_page[self._key(announcement)]
            assert number not in self._waiting, f"request {number} announces and waits"
            assert announcement.done_pages < announcement.num_pages
        for number, waiter in self._waiting.items():
            assert waiter.request.number == number and not waiter.request.running
            assert self._by_request[waiter.announcement.request.number] is waiter.announcement
            assert waiter.announcement.waiters[number] is waiter
        assert self.num_bytes == sum(len(a.tokens) for a in self)
        assert sum(map(len, self._by_first_page.values())) == len(self._by_request)
        assert sum(len(a.waiters) for a in self) == len(self._waiting)
