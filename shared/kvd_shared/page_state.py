"""The states of a page in a page map, by their number there."""

from __future__ import annotations

from enum import IntEnum


class PageState(IntEnum):
    FREE = 0
    WRITING = 1
    ACTIVE = 2  # in the tree, held by one session
    SHARED = 3  # in the tree, held by two or more
    CACHED = 4  # in the tree, held by nobody
    DUPLICATE = 5  # sealed outside the tree: the tree has its tokens, or it is a tail
    QUARANTINED = 6
    LEASED = 7  # allocated ahead of need
    DETACHED = 8  # held, and flushed: it cannot be matched
