"""The cache core and its reference model side by side: how they are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvd.cache import NO_OPTIONS, CacheManager
from kvd.options import CacheOptions
from kvd.results import Match
from kvd.session import Session
from kvd_shared.errors import KvdError, NoPages
from tests.kvd.agreement import CoreView, Told, agree, agree_order
from tests.kvd.metadata.worlds import process, small_metadata
from tests.kvd.reference_model import Found, ReferenceModel
from tests.kvd.reference_parts import ReferenceOperator, ReferenceSequences, ReferenceTickets
from tests.kvd.reference_sessions import ModelSession
from tests.kvd.snapshot import snapshot
from tests.kvd.tokens import PAGE_SIZE, unpacked

Outcome = tuple[str, Any]


class Pairing:
    """Each method performs one operation on both, asserts that answer and state agree, and returns
    the answer as ("ok", value) or (error code, missing pages).

    `check_every`: the whole states are compared after every so many operations (and by `check`);
    the answers always are. `strict`: a refused operation is seen to leave every bit as it was.
    """

    def __init__(
        self,
        num_pages: int,
        num_sessions: int = 3,
        page_size: int = PAGE_SIZE,
        options: CacheOptions = NO_OPTIONS,
        check_every: int = 1,
        strict: bool = True,
    ) -> None:
        self.core = CacheManager(
            num_pages, page_size, options, small_metadata(num_pages, page_size)
        )
        self.view = CoreView(self.core)
        self.model = ReferenceModel(num_pages, page_size, options, self.view)
        self.model_sequences = ReferenceSequences(self.model)
        self.model_tickets = ReferenceTickets(self.model)
        self.model_operator = ReferenceOperator(self.model, options)
        self.told = self.core.tree.observer = Told()
        self.check_every, self.strict, self.num_operations = check_every, strict, 0
        self.now = 0.0
        self.sessions: dict[int, Session] = {}
        for number in range(1, num_sessions + 1):
            self.open(number)

    def open(self, number: int) -> None:
        self.sessions[number] = self.core.open_session(
            number, f"worker {number}", self.now, process(number)
        )
        self.model.open_session(number)

    def both_sessions(self, number: int) -> tuple[Session, ModelSession]:
        return self.sessions[number], self.model.sessions[number]

    # --- agreement

    def _found(
        self, core: Callable[[], Any], model: Callable[[list[int], int | None], Any]
    ) -> Outcome:
        """For what returns a Match, or a handle and a Match."""

        def plain(found: Any) -> Any:
            handle, found = found if isinstance(found, tuple) else (None, found)
            assert isinstance(found, Match)
            matched = found.num_matched_pages
            assert found.matched_tokens == matched * self.model.page_size or not found.refs
            refs = unpacked(found.refs)
            partial = found.partial_ref, found.partial_tokens
            pending = found.pending_tokens, found.pending_s
            return handle, refs, found.stop, partial, pending, refs[matched:]

        def expected(got: Any) -> Any:
            new, chosen = (got[5], got[3][0]) if got else ([], None)
            found = model(new, chosen)
            handle, found = found if isinstance(found, tuple) else (None, found)
            assert isinstance(found, Found)
            pending: tuple[int, float | None] = 0, None
            if found.pending is not None:
                pending = found.pending.num_pages * self.model.page_size, found.pending.seconds
            partial = (chosen if found.partial else None), found.partial_tokens
            return handle, found.refs, found.stop, partial, pending, new

        return self._both(lambda: plain(core()), expected)

    def _both(self, core: Callable[[], Any], model: Callable[[Any], Any]) -> Outcome:
        before, got = snapshot(self.core) if self.strict else {}, None
        try:
            got = core()
            here: Outcome = ("ok", got)
        except KvdError as e:
            here = (e.code, e.details.get("missing"))
            if self.strict:
                self._unchanged(before, e)
        try:
            there: Outcome = ("ok", model(got))
        except KvdError as e:
            there = (e.code, e.details.get("missing"))
        assert here == there, f"core {here}, model {there}"
        notices = [(kind, request.number, tokens) for kind, request, tokens in self.core.notices]
        assert notices == self.model.queue.notices
        self.core.notices.clear()
        self.model.queue.notices.clear()
        self.num_operations += 1
        if self.num_operations % self.check_every == 0:
            self.check()
        return here

    def _unchanged(self, before: dict[str, Any], error: KvdError) -> None:
        after = snapshot(self.core)
        if isinstance(error, NoPages):  # leaves its demand, and ends what it announced
            for part in ("queue", "announced", "notices"):
                del before[part], after[part]
        assert after == before, f"{error.code} changed the cache"

    def check(self) -> None:
        agree(
            self.core,
            self.model,
            self.model_sequences,
            self.model_tickets,
            self.model_operator,
            self.told,
        )
        agree_order(self.view, self.model, set())
