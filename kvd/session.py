"""One attached process and everything it holds in one pool."""

from __future__ import annotations

from kvd.node import Node


class Session:
    """The holder of pages. Owned by the cache manager, which alone changes it.

    Invariants: no page reference is in two of `writing`, `sealed` and `nodes`; counts are >= 1;
    an ended session keeps what it holds until its process is proven dead.
    """

    __slots__ = ("attached_s", "ended", "id", "name", "nodes", "sealed", "writing")

    def __init__(self, session_id: int, name: str, now: float) -> None:
        self.id = session_id
        self.name = name
        self.attached_s = now
        self.ended = False
        self.writing: dict[int, int] = {}  # own unsealed pages: reference -> holds
        self.sealed: dict[int, int] = {}  # own sealed pages outside the tree: reference -> holds
        self.nodes: dict[Node, None] = {}  # tree nodes that have this session as a holder

    @property
    def num_held_pages(self) -> int:
        in_tree = sum(node.num_pages for node in self.nodes)
        return len(self.writing) + len(self.sealed) + in_tree

    def __repr__(self) -> str:
        return f"<session {self.id} {self.name!r}>"
