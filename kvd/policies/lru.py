"""Least recently used first, exactly."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvd.node import Node


class Lru(OrderedDict["Node", None]):
    """Nodes in the order in which their last hold ended.

    A child is released before its parent and so stands before it: the first is always a leaf.
    """

    def add(self, node: Node) -> None:
        self[node] = None

    def discard(self, node: Node) -> None:
        del self[node]

    def victim(self) -> Node:
        return next(iter(self))

    def portion(self, node: Node) -> int:
        return len(node.refs) >> 3

    def evicted(self, node: Node, num_pages: int) -> None:
        """Order depends on use alone."""

    def alike(self, parent: Node, child: Node) -> bool:
        return True  # released together: nothing tells them apart
