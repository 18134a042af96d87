"""Each page's valid reference and its owner: what decides, after a crash, what a page is.

The order of stores is the safety:
- a page becomes free: its generation is raised, which kills its record at once; then its owner;
- a page enters the tree: its record is stored; then its owner.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvd.metadata.cold import ColdStart
from kvd.metadata.failpoints import FAILPOINTS
from kvd_shared.refs import REF_BYTES

Refs = npt.NDArray[np.int64]
Owners = npt.NDArray[np.uint64]

FREE = 0
MAX_SESSION = 0xFFFF_FF00  # ids of sessions are from 1 to below this
DOOMED = 0xFFFF_FFFC  # expired: it and all behind it are matched no more
UNRECORDED = 0xFFFF_FFFD  # in the tree, under a namespace for which the table has no room
OUTSIDE = 0xFFFF_FFFE  # sealed outside the tree
IN_TREE = 0xFFFF_FFFF
_PAGE = 0xFFFF_FFFF
_LOWER = np.uint64(0xFFFF_FFFF)
_REFS = np.dtype("<i8")
_PAGES = np.int64(_PAGE)
_CHECK = 0x9E37_79B9


def owner_word(owner: int) -> int:
    """What is stored: the owner, and above it 32 bits by which a stray write is recognised."""
    return owner | ((owner + 1) * _CHECK & 0xFFFF_FFFF) << 32


_FREE_WORD = owner_word(FREE)
_DOOMED_WORD = owner_word(DOOMED)


class PageStates:
    """`current[page]` is the only valid reference of a page, `owner[page]` the word of one of the
    above or of the session that has the page to itself (leased, or writing)."""

    __slots__ = ("_current_one", "_owner_one", "current", "owner", "recorded")

    def __init__(self, current: Refs, owner: Owners, recorded: bool = True) -> None:
        """`recorded`: else nobody will read it, and owners are not stored."""
        self.recorded = recorded
        self.current = current
        self.owner = owner
        # The same memory: single stores are quicker this way.
        self._current_one = memoryview(current.data)
        self._owner_one = memoryview(owner.data)

    def current_of(self, page: int) -> int:
        return int(self._current_one[page])

    def owner_of(self, page: int) -> int:
        return int(self._owner_one[page]) & 0xFFFF_FFFF

    def all_free(self) -> None:
        """For new memory."""
        self.current[:] = np.arange(len(self.current))
        self.owner[:] = _FREE_WORD

    def owners(self) -> npt.NDArray[np.int64]:
        """Each page's owner. Raises ColdStart where a reference or an owner is none."""
        pages = np.arange(len(self.current))
        wrong = np.flatnonzero((self.current & _PAGE != pages) | (self.current < 0))
        if len(wrong):
            raise ColdStart("pages", f"page {wrong[0]} has the reference of another")
        found = self.owner & _LOWER
        check = ((found + np.uint64(1)) * np.uint64(_CHECK)) & _LOWER
        wrong = np.flatnonzero(self.owner >> np.uint64(32) != check)
        if len(wrong):
            raise ColdStart("pages", f"page {wrong[0]} has no owner that can be read")
        return found.astype(np.int64)

    def taken(self, refs: bytes, session_id: int) -> None:
        """Free pages are the session's to write from now on."""
        if not self.recorded:
            return
        if FAILPOINTS.armed:
            FAILPOINTS.hit("taken.before_owner")
        word = session_id | ((session_id + 1) * _CHECK & 0xFFFF_FFFF) << 32  # see owner_word
        if len(refs) == REF_BYTES:
            self._owner_one[int.from_bytes(refs[:4], "little")] = word
        else:
            self.owner[np.frombuffer(refs, _REFS) & _PAGES] = word
        if FAILPOINTS.armed:
            FAILPOINTS.hit("taken.done")

    def freed(self, raised: int) -> None:
        """The page of this reference is free, and the reference will be that of its next use."""
        page = raised & _PAGE
        if not self.recorded:
            self._current_one[page] = raised
            return
        if FAILPOINTS.armed:
            FAILPOINTS.hit("freed.before_generation")
        self._current_one[page] = raised
        if FAILPOINTS.armed:
            FAILPOINTS.hit("freed.before_owner")
        self._owner_one[page] = _FREE_WORD
        if FAILPOINTS.armed:
            FAILPOINTS.hit("freed.done")

    def freed_many(self, raised: Refs) -> None:
        pages = raised & _PAGES
        if not self.recorded:
            self.current[pages] = raised
            return
        if FAILPOINTS.armed:
            FAILPOINTS.hit("freed.before_generation")
        self.current[pages] = raised
        if FAILPOINTS.armed:
            FAILPOINTS.hit("freed.before_owner")
        self.owner[pages] = _FREE_WORD
        if FAILPOINTS.armed:
            FAILPOINTS.hit("freed.done")

    def set_owner(self, refs: bytes, owner: int) -> None:
        """For what has its own failpoints around it."""
        if not self.recorded:
            return
        word = owner_word(owner)
        if len(refs) == REF_BYTES:
            self._owner_one[int.from_bytes(refs[:4], "little")] = word
        else:
            self.owner[np.frombuffer(refs, _REFS) & _PAGES] = word

    def doomed(self, ref: int) -> None:
        """This page of the tree cannot be matched any more, nor can those behind it."""
        if FAILPOINTS.armed:
            FAILPOINTS.hit("doomed.before_owner")
        self._owner_one[ref & _PAGE] = _DOOMED_WORD
        if FAILPOINTS.armed:
            FAILPOINTS.hit("doomed.done")
