"""A worker's own account of the pages that it holds, noted in its history as it changes."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterable

from tests.chaos.history import History, Kind


class Ledger:
    """Invariant: counts are from 1; what is in `own` is the worker's to write."""

    def __init__(self, history: History) -> None:
        self.holds: Count[int] = Count()
        self.own: set[int] = set()
        self._history = history

    def took_own(self, refs: Iterable[int]) -> None:
        """New pages, after the reply that gave them."""
        for ref in refs:
            if ref in self.holds:
                self._history.violation("a page was given that this worker holds", ref=ref)
            self.holds[ref] += 1
            self.own.add(ref)
            self._history.note(Kind.OWN, (ref,))

    def took(self, refs: Iterable[int]) -> None:
        """One hold more on each page, after the reply that gave it."""
        for ref in refs:
            self.holds[ref] += 1
            if self.holds[ref] == 1:
                self._history.note(Kind.READ, (ref,))

    def sealing(self, refs: Iterable[int]) -> None:
        """Pages are about to be published or sealed: they are not written from now on."""
        for ref in refs:
            if ref in self.own:
                self.own.discard(ref)
                self._history.note(Kind.SEALED, (ref,))

    def not_sealed(self, refs: Iterable[int]) -> None:
        """That was refused: they are the worker's still."""
        for ref in refs:
            self.own.add(ref)
            self._history.note(Kind.OWN, (ref,))

    def letting_go(self, refs: Iterable[int]) -> None:
        """One hold less on each, before the request that says so."""
        for ref in refs:
            self.holds[ref] -= 1
            if not self.holds[ref]:
                del self.holds[ref]
                self.own.discard(ref)
                self._history.note(Kind.LET_GO, (ref,))

    def lost(self) -> None:
        """The session, or the pool, is over."""
        self.holds.clear()
        self.own.clear()
        self._history.note(Kind.LOST, (0,))
