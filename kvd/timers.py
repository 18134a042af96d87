"""Which nodes time does something to, and when."""

from __future__ import annotations

from collections import OrderedDict

from sortedcontainers import SortedDict

from kvd.node import NEVER, Node


class Timers:
    """Invariant: a node whose `timer_s` is not NEVER stands at that time and nowhere else, so there
    are never more of them than nodes in the tree: a node that leaves it is discarded."""

    def __init__(self) -> None:
        # time -> its nodes, in the order of their coming (a plain dict, emptied from its front,
        # would be searched from its front each time)
        self._due: SortedDict = SortedDict()

    def __len__(self) -> int:
        return sum(map(len, self._due.values()))

    def set(self, node: Node, due_s: float) -> None:
        """Look at the node then, or earlier where that was said before."""
        if due_s < node.timer_s:
            self.discard(node)
            node.timer_s = due_s
            self._due.setdefault(due_s, OrderedDict())[node] = None

    def discard(self, node: Node) -> None:
        if node.timer_s != NEVER:
            nodes = self._due[node.timer_s]
            del nodes[node]
            if not nodes:
                del self._due[node.timer_s]
            node.timer_s = NEVER

    def is_due(self, now: float) -> bool:
        return bool(self._due) and self._due.peekitem(0)[0] <= now

    def pop(self) -> Node:
        """The node that is to be looked at first."""
        node: Node = next(iter(self._due.peekitem(0)[1]))
        self.discard(node)
        return node
