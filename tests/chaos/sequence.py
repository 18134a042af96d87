"""One sequence of a light worker, and the reading and writing of its pages."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from kvd_shared.client import KvdClient
from kvd_shared.refs import TokenIds, page_ids
from tests.chaos.content import LANES, PAGE_SIZE, Path, Universe, Words
from tests.chaos.history import Counter, History


@dataclass(slots=True, eq=False)
class Sequence:
    """Invariants: `confirmed <= published <= written // PAGE_SIZE`; of a running one `refs` holds
    the pages of the first `length` tokens, but for those that it waits for."""

    path: Path
    request: int
    goal: int  # tokens, at its end
    length: int  # tokens it has by now: the prompt, and what has grown
    refs: list[int] = field(default_factory=list)
    written: int = 0  # tokens whose slots are right
    published: int = 0  # pages, also such as are under way
    confirmed: int = 0  # of these, the ones that were answered
    running: bool = False
    asked_to_yield: bool = False
    fork_request: int | None = None  # the number of the branch to be
    hands_over: bool = False  # at its end, its pages go to another worker
    publishes_late: bool = False  # only at its end
    forks: bool = False
    swapping: bool = False  # a publish is under way: its answer can change the block table
    detached: bool = False  # flushed: nothing more of it is published
    tail_to_copy: bool = False  # the last page is another worker's sealed tail

    @property
    def full_pages(self) -> int:
        return self.written // PAGE_SIZE

    @property
    def missing_pages(self) -> int:
        return max(0, -(-self.length // PAGE_SIZE) - len(self.refs))

    @property
    def finished(self) -> bool:
        return self.running and not self.tail_to_copy and self.written >= self.goal


class Fenced(Exception):
    """Pages held here may be another's by now: what was read of them is not used."""


class Pages:
    """The mapped pool as words, and what has to stand in it. `unfenced_s`: when the fence was last
    seen not to be up.

    Every method raises Fenced once the daemon has fenced the session: what they have read is then
    neither compared nor used, and what was written is not published.
    """

    def __init__(self, client: KvdClient, universe: Universe, history: History) -> None:
        assert client.mapping is not None
        self._read = _words(client.mapping.read_view())
        self._write = _words(client.mapping.write_view())
        self._universe, self._history = universe, history
        self._client = client
        self.unfenced_s = 0.0
        self.heeds_fence = True

    def write(self, sequence: Sequence, start: int, stop: int) -> None:
        """The slots of these tokens."""
        words = self._universe.words(sequence.path)
        for place in range(start // PAGE_SIZE, -(-stop // PAGE_SIZE)):
            first, last = max(start, place * PAGE_SIZE), min(stop, (place + 1) * PAGE_SIZE)
            page = sequence.refs[place] & 0xFFFF_FFFF
            base = place * PAGE_SIZE
            self._write[page, first - base : last - base] = words[first:last]
        self._history.count(Counter.PAGES_WRITTEN, stop // PAGE_SIZE - start // PAGE_SIZE)
        self.look_at_fence()

    def copy(self, source: int, destination: int) -> None:
        """A whole page, to go on writing in the second."""
        self._write[destination & 0xFFFF_FFFF] = self._read[source & 0xFFFF_FFFF]
        self.look_at_fence()

    def look_at_fence(self) -> None:
        now = time.monotonic()
        if self.heeds_fence and self._client.fenced:
            raise Fenced
        self.unfenced_s = now

    def verify(self, sequence: Sequence, what: str) -> None:
        """The slots of all tokens that are written say what they must."""
        last = -(-sequence.written // PAGE_SIZE)
        if last:
            ids = page_ids(np.array(sequence.refs[:last], dtype=np.int64))
            found = self._read[ids].reshape(-1, LANES)[: sequence.written]
            self._compare(sequence, what, 0, found)
            self._history.count(Counter.PAGES_VERIFIED, last)

    def verify_partial(self, sequence: Sequence, ref: int, start: int, count: int) -> None:
        """A page that continues the sequence at `start`, with its first `count` slots."""
        found = self._read[ref & 0xFFFF_FFFF][:count].copy()
        self._compare(sequence, "a partial page", start, found)
        self._history.count(Counter.PAGES_VERIFIED)

    def _compare(self, sequence: Sequence, what: str, start: int, found: Words) -> None:
        """`found` was read before this: a fence that is not up now was not up then."""
        self.look_at_fence()
        wanted = self._universe.words(sequence.path)[start : start + len(found)]
        wrong = (found != wanted).any(axis=1)
        if wrong.any():
            token = start + int(wrong.argmax())
            place = token // PAGE_SIZE
            self._history.violation(
                f"wrong content in {what}",
                path=sequence.path.number,
                token=token,
                wrong_slots=int(wrong.sum()),
                ref=sequence.refs[place] if place < len(sequence.refs) else None,
                written=sequence.written,
                published=sequence.published,
            )

    def tokens(self, sequence: Sequence) -> TokenIds:
        return self._universe.tokens(sequence.path)


def _words(view: memoryview) -> Words:
    return np.frombuffer(view, dtype="<u8").reshape(-1, PAGE_SIZE, LANES)
