"""What an eviction policy is asked, and told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvd.node import Node


class Policy(ABC):
    """The order in which the unprotected nodes of one tenant and priority lose their pages.

    It reads nodes (hits, last_use_s, num_pages, depth) and owns `node.rank`; it has no clock. It
    need not know the tree's shape: a victim that still has children is put aside by the caller
    and added again when they are gone.
    """

    @abstractmethod
    def add(self, node: Node) -> None:
        """The node has become unprotected. Its children usually did before it."""

    @abstractmethod
    def discard(self, node: Node) -> None:
        """The node, which was added, is protected again or gone."""

    @abstractmethod
    def victim(self) -> Node:
        """Whose last pages go next. Called only while something is in order; removes nothing."""

    @abstractmethod
    def portion(self, node: Node) -> int:
        """How many of a victim's last pages may go before its turn is over; at least one."""

    @abstractmethod
    def evicted(self, node: Node, num_pages: int) -> None:
        """So many of its last pages went; the node was discarded before if nothing is left."""

    @abstractmethod
    def alike(self, parent: Node, child: Node) -> bool:
        """May an only child that is released together with its parent become one node with it?"""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Node]:
        """All nodes in order, if the order is of that kind; for checks."""
