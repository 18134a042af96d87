"""One attached process and everything it holds in one pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvd.node import Node
    from kvd.sequences import CacheSequence


class Session:
    """The holder of pages. Owned by the cache manager, which alone changes it.

    Invariants: no page reference is in two of `leased`, `writing`, `sealed` and `nodes`; counts
    are >= 1; an ended session keeps what it holds until its process is proven dead.
    """

    __slots__ = (
        "attached_s",
        "ended",
        "id",
        "leased",
        "name",
        "nodes",
        "num_requests",
        "sealed",
        "sequences",
        "writing",
    )

    def __init__(self, session_id: int, name: str, now: float) -> None:
        self.id = session_id
        self.name = name
        self.attached_s = now
        self.ended = False
        self.num_requests = 0  # begun and not ended
        # Its pages outside the tree, each with how often it holds them:
        self.leased: dict[int, int] = {}  # allocated ahead of need, nothing written yet
        self.writing: dict[int, int] = {}  # its own to write
        self.sealed: dict[int, int] = {}  # complete, and never in the tree
        self.nodes: dict[Node, None] = {}  # tree nodes that have this session as a holder
        self.sequences: dict[int, CacheSequence] = {}  # by handle

    @property
    def num_held_pages(self) -> int:
        in_tree = sum(node.num_pages for node in self.nodes)
        return len(self.leased) + len(self.writing) + len(self.sealed) + in_tree

    def own(self, ref: int) -> dict[int, int] | None:
        """Which of its own dicts has the page."""
        if ref in self.writing:
            return self.writing
        if ref in self.leased:
            return self.leased
        return self.sealed if ref in self.sealed else None

    def __repr__(self) -> str:
        return f"<session {self.id} {self.name!r}>"
