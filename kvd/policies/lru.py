"""Least recently used first, exactly."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvd.policies.policy import Policy

if TYPE_CHECKING:
    from kvd.node import Node


class Lru(Policy):
    """Nodes in the order in which their last hold ended.

    A child is released before its parent and so stands before it: the first is always a leaf.
    """

    def __init__(self) -> None:
        self._nodes: OrderedDict[Node, None] = OrderedDict()

    def add(self, node: Node) -> None:
        self._nodes[node] = None

    def discard(self, node: Node) -> None:
        del self._nodes[node]

    def victim(self) -> Node:
        return next(iter(self._nodes))

    def portion(self, node: Node) -> int:
        return len(node.refs) >> 3

    def evicted(self, node: Node, num_pages: int) -> None:
        """Order depends on use alone."""

    def alike(self, parent: Node, child: Node) -> bool:
        return True  # released together: nothing tells them apart

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)
