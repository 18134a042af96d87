"""The cache core and its reference model side by side: each operation goes to both."""

from __future__ import annotations

from array import array
from typing import Any

from kvd.retention import DEFAULT_PRIORITY
from kvd_shared.namespace import Namespace
from tests.kvd.agreement import agree_order
from tests.kvd.paired_work import PairedWork
from tests.kvd.pairing import Outcome
from tests.kvd.tokens import packed, unpacked


class PairedCache(PairedWork):
    """What workers ask, and besides: sequences by handle, tickets, operators, deaths and time."""

    # --- sequences, by handle

    def open_sequence(
        self, session: int, namespace: Namespace, tokens: bytes, number: int | None, ahead: int,
        least: int | None = None, announce: bool = False, rate: float | None = None,
    ) -> Outcome:  # fmt: skip
        one, mine = self.both_sessions(session)
        return self._found(
            lambda: self.core.sequences.open(
                one, namespace, tokens, number, ahead, self.now, least, announce, rate
            ),
            lambda new, chosen: self.model_sequences.open(
                mine, namespace, tokens, number, ahead, self.now, least, announce, rate,
                new, chosen,
            ),
        )  # fmt: skip

    def extend(self, session: int, rows: list[tuple[int, int, bytes]]) -> Outcome:
        """Rows of (handle, tokens computed, new tokens). Returns (status, new pages, swaps)."""
        one, mine = self.both_sessions(session)
        handles, computed, tokens = zip(*rows, strict=True)

        def core() -> list[tuple[int, list[int], list[tuple[int, int]]]]:
            done = self.core.sequences.extend(
                one,
                array("q", handles),
                array("i", computed),
                array("i", [len(t) // 4 for t in tokens]),
                b"".join(tokens),
                self.now,
            )
            swaps: list[list[tuple[int, int]]] = [[] for _ in rows]
            for row, place, ref in zip(
                done.swap_rows, done.swap_places, done.swap_refs, strict=True
            ):
                swaps[row].append((place, ref))
            refs = done.refs.tolist()
            return [
                (status, [refs.pop(0) for _ in range(count)], swaps[row])
                for row, (status, count) in enumerate(zip(done.status, done.num_new, strict=True))
            ]

        def model(got: Any) -> Any:
            self.model.live(mine)
            return [
                (row.status, row.new, row.swaps)
                for (handle, computed, tokens), (_, new, _) in zip(rows, got, strict=True)
                for row in [
                    self.model_sequences.extend(mine, handle, computed, tokens, self.now, new)
                ]
            ]

        return self._both(core, model)

    def fork_sequence(self, session: int, handle: int, numbers: list[int | None]) -> Outcome:
        one, mine = self.both_sessions(session)

        def core() -> tuple[list[int], list[int], list[int]]:
            handles, new, source = self.core.sequences.fork(one, handle, numbers, self.now)
            return handles, unpacked(new), [] if source is None else [source]

        return self._both(
            core,
            lambda got: self.model_sequences.fork(
                mine, handle, numbers, self.now, got[1] if got else []
            ),
        )

    def close(self, session: int, handles: list[int]) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: self.core.sequences.close(one, array("q", handles), self.now),
            lambda _: self.model_sequences.close(mine, handles, self.now),
        )

    # --- handing over

    def hand_over(self, session: int, refs: list[int], ticket: bytes, ttl_s: float) -> Outcome:
        one, mine = self.both_sessions(session)
        return self._both(
            lambda: self.core.handover.hand_over(one, packed(refs), ticket, ttl_s, self.now),
            lambda _: self.model_tickets.hand_over(mine, refs, ticket, ttl_s, self.now),
        )

    def take_over(self, session: int, ticket: bytes) -> Outcome:
        one, mine = self.both_sessions(session)

        def core() -> tuple[list[int], int]:
            refs, tokens = self.core.handover.take_over(one, ticket, self.now)
            return unpacked(refs), tokens

        return self._both(core, lambda _: self.model_tickets.take_over(mine, ticket, self.now))

    # --- operators

    def operator_retain(
        self, namespace: Namespace, tokens: bytes, duration_s: float | None
    ) -> Outcome:
        return self._both(
            lambda: self.core.operator.retain(namespace, tokens, duration_s, self.now),
            lambda _: self.model_operator.retain(namespace, tokens, duration_s, self.now),
        )

    def operator_release(self, number: int) -> Outcome:
        return self._both(
            lambda: self.core.operator.release(number, self.now),
            lambda _: self.model_operator.release(number, self.now),
        )

    def evict(self, count: int) -> Outcome:
        def model(got: Any) -> int:
            self.model.tree.now = self.now
            count_now = min(count, self.model.tree.num_evictable)
            self.model.tree.evict(count_now, set())
            return count_now

        return self._both(lambda: self.core.evict(count, self.now), model)

    def flush(self, namespace: Namespace) -> Outcome:
        def core() -> None:
            root = self.core.tree.roots.get(namespace)
            self.core.flush([root] if root else [])

        return self._both(core, lambda _: self.model.flush(namespace, "flushed"))

    def raise_weights_version(self, model_name: str | None, version: int) -> Outcome:
        """And flush what is too old then, as the daemon does in one turn."""

        def core() -> None:
            self.core.raise_weights_version(model_name, version)
            roots, is_stale = list(self.core.tree.roots.values()), self.core.versions.is_stale
            self.core.flush([r for r in roots if is_stale(r.namespace)], "stale_version")

        return self._both(core, lambda _: self.model.raise_weights_version(model_name, version))

    # --- sessions and time

    def end_session(self, session: int) -> None:
        one, mine = self.both_sessions(session)
        self._both(lambda: self.core.end_session(one), lambda _: self.model.end_session(mine))

    def release_session(self, session: int) -> None:
        one, mine = self.both_sessions(session)

        def model(_: Any) -> None:
            self.model.end_session(mine)
            self.model.bury(mine)
            self.model_sequences.drop_session(mine)

        self._both(lambda: self.core.release_session(one), model)
        del self.sessions[session]

    def tick(self) -> Outcome:
        def model(_: Any) -> None:
            self.model.queue.tick(self.now)
            self.model.waits.tick(self.now)
            self.model_tickets.tick(self.now)
            self.model_operator.tick(self.now)

        return self._both(lambda: self.core.tick(self.now), model)

    def sweep(self) -> bool:
        """One portion; returns whether there is more."""
        tree = self.model.tree

        def model(more: bool) -> bool:
            before = tree.in_order
            decayed = self._model_sweep()
            agree_order(self.view, self.model, tree.in_order - before | decayed)
            return more

        more: bool = self._both(lambda: self.core.sweep(self.now), model)[1]
        if not more:
            assert not self.model.dying and not tree.doomed() and not tree.due(self.now)
            assert self.told.pages.keys() == {r for r, p in tree.pages.items() if not p.gone_for}
        return more

    def sweep_all(self) -> None:
        for _ in range(1000):
            if not self.sweep():
                return
        raise AssertionError("sweep has more to do for ever")

    def _model_sweep(self) -> set[int]:
        """What may be done by and by; how much of it was done is the core's choice. Returns the
        pages that have come to another place in the order."""
        model, tree, now = self.model, self.model.tree, self.now
        tree.now = now
        if model.dying:
            mine = model.dying[0]
            one = self.core.sessions.get(mine.number)
            left = self.view.held(one) if one else {}
            model.drop(mine, set(left), now)
            if one is None:
                model.dying.remove(mine)
                del model.sessions[mine.number]
            return set()
        moved = set()
        while gone := [p for p in tree.doomed() if not self.view.is_in_tree(p.ref)]:
            tree.leave(gone[0], gone[0].gone_for)
        for page in tree.due(now):
            if page.gone_for:
                continue
            if page.expires_s <= now:
                if not self.view.is_matchable(page.ref):
                    tree.expire(page)
            elif self.view.has_decayed(page.ref):
                moved |= {page.ref} if page.priority != DEFAULT_PRIORITY else set()
                tree.decay(page)
        return moved
