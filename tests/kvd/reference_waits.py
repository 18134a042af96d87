"""Who computes what, and who waits for it: the rules of announcements over one dict."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvd_shared.errors import BadRequest
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES
from tests.kvd.reference_queue import ReferenceQueue, Request


@dataclass(eq=False)
class Announced:
    request: Request
    namespace: Namespace
    tokens: bytes
    num_pages: int
    first_page: int
    done_pages: int
    began_s: float
    progress_s: float
    interval_s: float = 0.0
    waiters: dict[int, int] = field(default_factory=dict)  # pages that each request waits for

    def stalled(self, now: float) -> bool:
        patience_s = max(1.0, 4 * self.interval_s) if self.interval_s else 10.0
        return now - self.progress_s > patience_s


@dataclass
class Pending:
    announced: Announced
    num_pages: int
    seconds: float | None


class ReferenceWaits:
    def __init__(self, page_size: int, queue: ReferenceQueue) -> None:
        self.page_size = page_size
        self.queue = queue  # has the notices
        self.announced: dict[int, Announced] = {}  # by request, in the order of announcing

    def of_session(self, session: int) -> list[Announced]:
        return [a for a in self.announced.values() if a.request.session == session]

    def announce(
        self, request: Request, namespace: Namespace, tokens: bytes, cached: int, now: float
    ) -> None:
        if not request.running:
            raise BadRequest("")
        self.end(request)
        pages = len(tokens) // TOKEN_BYTES // self.page_size
        if pages > cached:
            one = Announced(request, namespace, tokens, pages, cached, cached, now, now)
            self.announced[request.number] = one

    def published(self, one: Announced, cached: int, now: float) -> None:
        if cached <= one.done_pages:
            return
        one.interval_s, one.progress_s, one.done_pages = now - one.progress_s, now, cached
        for number, pages in list(one.waiters.items()):
            if cached >= pages:
                del one.waiters[number]
            kind = "ready" if cached >= pages else "progress"
            self.tell(kind, number, min(cached, pages))
        if cached >= one.num_pages:
            self.end(one.request)

    def end(self, request: Request) -> None:
        one = self.announced.pop(request.number, None)
        for number in one.waiters if one else ():
            self.tell("ended", number, one.done_pages if one else 0)

    def computes_no_more(self, request: Request) -> None:
        self.end(request)
        self.stop_waiting(request)

    def tell(self, kind: str, number: int, pages: int) -> None:
        self.queue.notices.append((kind, number, pages * self.page_size))

    def pending(
        self, namespace: Namespace, tokens: bytes, most: int, cached: int, now: float,
        but: Request | None,
    ) -> Pending | None:  # fmt: skip
        """Who computes most of the prompt beyond what is cached, the first of several."""
        best: Pending | None = None
        for one in self.announced.values():
            if one.namespace != namespace or one.request is but or one.stalled(now):
                continue
            same = self.common_pages(one.tokens, tokens, min(most, one.num_pages))
            if same > max(best.num_pages if best else cached, one.done_pages):
                pages, seconds = one.done_pages - one.first_page, one.progress_s - one.began_s
                left = (same - one.done_pages) * self.page_size
                rate = pages * self.page_size / seconds if pages > 0 and seconds > 0 else None
                best = Pending(one, same, left / rate if rate else None)
        return best

    def common_pages(self, one: bytes, other: bytes, most: int) -> int:
        step = self.page_size * TOKEN_BYTES
        pages = 0
        while pages < most and one[: (pages + 1) * step] == other[: (pages + 1) * step]:
            pages += 1
        return pages

    def wait(self, request: Request, pending: Pending) -> None:
        pending.announced.waiters[request.number] = pending.num_pages

    def waiting_for(self, number: int) -> Announced | None:
        return next((a for a in self.announced.values() if number in a.waiters), None)

    def stop_waiting(self, request: Request) -> None:
        if one := self.waiting_for(request.number):
            del one.waiters[request.number]

    def tick(self, now: float) -> None:
        for one in list(self.announced.values()):
            if one.waiters and one.stalled(now):
                self.end(one.request)
