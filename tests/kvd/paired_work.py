"""What workers ask, of the cache core and of its reference model."""

from __future__ import annotations

from typing import Any

from kvd.retention import NO_WISH, Retention
from kvd_shared.errors import BadRequest, Draining, OverLimit
from kvd_shared.namespace import Namespace
from tests.kvd.pairing import Outcome, Pairing
from tests.kvd.tokens import packed, unpacked

MOST_BEGUN_AT_ONCE = 4096


class PairedWork(Pairing):
    # --- requests

    def begin(self, session: int, count: int) -> Outcome:
        one, mine = self.both_sessions(session)

        def model(_: Any) -> int:
            self.model.live(mine)
            if not 1 <= count <= MOST_BEGUN_AT_ONCE:
                raise BadRequest("")
            if self.core.draining:
                raise Draining("")
            if mine.num_requests + count > self.model.limits.max_requests_a_session:
                raise OverLimit("")
            mine.num_requests += count
            return self.model.queue.begin(session, count)

        return self._both(lambda: self.core.begin(one, count), model)

    def end(self, session: int, number: int) -> Outcome:
        one, mine = self.both_sessions(session)

        def model(_: Any) -> None:
            self.model.live(mine)
            request = self.model.queue.get(session, number)
            self.model.waits.computes_no_more(request)
            self.model.queue.requests.remove(request)
            mine.num_requests -= 1

        return self._both(lambda: self.core.end(one, number), model)

    def yielded(self, session: int, number: int) -> Outcome:
        one, mine = self.both_sessions(session)

        def model(_: Any) -> None:
            self.model.live(mine)
            request = self.model.queue.get(session, number)
            self.model.waits.computes_no_more(request)
            self.model.queue.yielded(request)

        return self._both(lambda: self.core.yielded(one, number), model)

    # --- matching

    def match(
        self, session: int, namespace: Namespace, tokens: bytes, least: int | None = None
    ) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._found(
            lambda: self.core.match(one, namespace, tokens, self.now, least),
            lambda new, chosen: self.model.match(mine, namespace, tokens, self.now, least, chosen),
        )

    def probe(self, session: int, namespace: Namespace, tokens: bytes) -> Outcome:
        one, mine = self.both_sessions(session)

        def model(_: Any) -> int:
            self.model.live(mine)
            return len(self.model.walk(namespace, tokens, self.now)) * self.model.page_size

        return self._both(lambda: self.core.probe(one, namespace, tokens, self.now), model)

    def acquire(
        self, session: int, namespace: Namespace, tokens: bytes, num_pages: int,
        number: int | None, least: int | None = None, announce: bool = False,
        rate: float | None = None,
    ) -> Outcome:  # fmt: skip
        one, mine = self.both_sessions(session)
        return self._found(
            lambda: self.core.acquire(
                one, namespace, tokens, num_pages, number, self.now, least, announce, rate
            ),
            lambda new, chosen: self.model.acquire(
                mine, namespace, tokens, num_pages, number, self.now, least, announce, rate,
                new, chosen,
            ),
        )  # fmt: skip

    def announce(self, session: int, number: int, namespace: Namespace, tokens: bytes) -> Outcome:
        one, mine = self.both_sessions(session)

        def model(_: Any) -> None:
            self.model.live(mine)
            request = self.model.queue.get(session, number)
            cached = len(self.model.walk(namespace, tokens, self.now))
            self.model.announce(request, namespace, tokens, cached, self.now)

        return self._both(
            lambda: self.core.announce(one, number, namespace, tokens, self.now), model
        )

    def wait(
        self, session: int, number: int, namespace: Namespace, tokens: bytes, rate: float
    ) -> Outcome:
        """How far another's computing will make the prompt cached, in tokens and seconds."""
        one, mine = self.both_sessions(session)

        def core() -> tuple[int, float | None] | None:
            found = self.core.wait(one, number, namespace, tokens, rate, self.now)
            return (found.pending_tokens, found.pending_s) if found else None

        def model(_: Any) -> tuple[int, float | None] | None:
            self.model.live(mine)
            request = self.model.queue.get(session, number)
            cached = len(self.model.walk(namespace, tokens, self.now))
            found = self.model.wait(request, namespace, tokens, cached, rate, self.now)
            return (found.num_pages * self.model.page_size, found.seconds) if found else None

        return self._both(core, model)

    # --- pages

    def allocate(self, session: int, count: int, number: int | None) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: unpacked(self.core.allocate(one, count, number, self.now)),
            lambda got: self.model.allocate(mine, count, number, self.now, got or []),
        )

    def lease(self, session: int, count: int, number: int | None) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: unpacked(self.core.lease(one, count, number, self.now)),
            lambda got: self.model.lease(mine, count, number, self.now, got or []),
        )

    def use(self, session: int, refs: list[int]) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: self.core.use(one, packed(refs)), lambda _: self.model.use(mine, refs)
        )

    def share(self, session: int, refs: list[int]) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: self.core.share(one, packed(refs)), lambda _: self.model.share(mine, refs)
        )

    def free(self, session: int, refs: list[int]) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: self.core.free(one, packed(refs), self.now),
            lambda _: self.model.give_back(mine, refs, self.now),
        )

    def fork(
        self, session: int, refs: list[int], num_tokens: int, count: int, number: int | None
    ) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: unpacked(
                self.core.fork(one, packed(refs), num_tokens, count, number, self.now)
            ),
            lambda got: self.model.fork(mine, refs, num_tokens, count, number, self.now, got or []),
        )

    def make_writable(self, session: int, ref: int, number: int | None) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: [self.core.make_writable(one, ref, number, self.now)],
            lambda got: self.model.make_writable(mine, ref, number, self.now, got or []),
        )

    def seal_tail(self, session: int, ref: int, num_tokens: int) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: self.core.seal_tail(one, ref, num_tokens),
            lambda _: self.model.seal_tail(mine, ref, num_tokens),
        )

    # --- publishing

    def publish(
        self, session: int, namespace: Namespace, tokens: bytes, refs: list[int],
        after: int | None, retention: Retention = NO_WISH,
    ) -> Outcome:  # fmt: skip
        one, mine = self.both_sessions(session)

        def core() -> list[int]:
            done = self.core.publish(
                one, namespace, tokens, packed(refs), after, self.now, retention
            )
            canonical = unpacked(done.refs)
            differ = sum(a != b for a, b in zip(canonical, refs, strict=True))
            assert done.num_duplicates == differ
            return canonical

        return self._both(
            core,
            lambda _: self.model.publish(mine, namespace, tokens, refs, after, self.now, retention),
        )

    def retain(self, session: int, refs: list[int], retention: Retention) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: self.core.retain(one, packed(refs), retention),
            lambda _: self.model.retain(mine, refs, retention),
        )
