"""Which pages are free, each with the generation that its next use will have."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from kvd.metadata import Metadata
from kvd.metadata.page_states import PageStates
from kvd_shared.refs import GENERATION, MAX_REF, REF_BYTES, page_of, refs_from_bytes

Refs = npt.NDArray[np.int64]
FEW = 24  # pages: so many are done one by one


class FreeList:
    """A stack of page references: a page freed last is used first, while it is warm.

    Invariant: no page is on the stack twice; `current[page]` is the only generation of a page
    whose references are valid, and a page on the stack is there with that generation.
    """

    def __init__(self, num_pages: int, states: PageStates | None = None) -> None:
        self._stack = array("q", range(num_pages - 1, -1, -1))  # page 0 goes first
        self._states = Metadata.in_memory(num_pages, 1).pages if states is None else states
        self._current = self._states.current  # each page's reference now

    def __len__(self) -> int:
        return len(self._stack)

    def take(self, n: int) -> array[int]:
        """References of n pages. The caller has checked that as many are free."""
        if n == 0:
            return array("q")
        taken = self._stack[-n:]
        del self._stack[-n:]
        taken.reverse()
        return taken

    def restore(self, free: Refs) -> None:
        """Only these pages are free, the first of them first: after a restart."""
        self._stack = array("q", free[::-1].tobytes())

    def put(self, refs: bytes) -> None:
        """Make pages free and raise their generation. They can be taken again at once."""
        self._stack.extend(self.renew(refs))

    def renew(self, refs: bytes) -> array[int]:
        """Raise the generation of pages that are in use; returns their new references, which are
        the caller's."""
        raised = array("q")
        if len(refs) <= FEW * REF_BYTES:  # a few are quicker without numpy
            for old in array("q", refs):
                ref = (old + GENERATION) & MAX_REF
                self._states.freed(ref)
                raised.append(ref)
            return raised
        many = (refs_from_bytes(refs) + GENERATION) & MAX_REF  # 31 bits of generation, then anew
        self._states.freed_many(many)
        raised.frombytes(many.tobytes())
        return raised

    def current(self, page: int) -> int:
        """The valid reference of a page, whatever its state is."""
        return self._states.current_of(page)

    def is_current(self, ref: int) -> bool:
        page = page_of(ref)
        return 0 <= page < len(self._current) and self.current(page) == ref

    def all_current(self, refs: Refs) -> bool:
        return bool((self._current[refs & 0xFFFF_FFFF] == refs).all())

    def slice(self, start: int, stop: int) -> Refs:
        """Some of the free references."""
        return refs_from_bytes(self._stack[start:stop].tobytes())

    def check(self) -> Refs:
        """The free references, after asserting the invariant."""
        free = refs_from_bytes(self._stack.tobytes())
        pages = free & 0xFFFF_FFFF
        assert len(np.unique(pages)) == len(pages), "a page is on the free list twice"
        assert (self._current[pages] == free).all(), "a free page has a stale generation"
        return free
