"""A node of the radix tree: one edge of whole pages, and who holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES

if TYPE_CHECKING:
    from kvd.session import Session


class Node:
    """The run of pages between two branch points below one namespace's root.

    Every page of a node is held by the same sessions equally often: an operation that would make
    them differ splits the node first. So a hold costs one entry a node, however long its edge is.

    A node is *protected* when it is held or has a protected child. Unprotected nodes, and only
    they, may be evicted.
    """

    __slots__ = (
        "children",
        "holders",
        "id",
        "last_use_s",
        "namespace",
        "parent",
        "protected_children",
        "refs",
        "tokens",
    )

    def __init__(
        self, node_id: int, namespace: Namespace, parent: Node | None, tokens: bytes, refs: bytes
    ) -> None:
        self.id = node_id
        self.namespace = namespace
        self.parent = parent  # None for a root
        self.tokens = tokens  # int32 token ids, a whole number of pages
        self.refs = refs  # int64 page references, as many
        self.children: dict[bytes, Node] = {}  # by the tokens of the child's first page, exactly
        self.holders: dict[Session, int] = {}  # how often it holds each page
        self.protected_children = 0  # of children
        self.last_use_s = 0.0  # when the last hold ended; meaningful while unheld

    @property
    def num_pages(self) -> int:
        return len(self.refs) // REF_BYTES

    @property
    def is_root(self) -> bool:
        return self.parent is None

    @property
    def protected(self) -> bool:
        return bool(self.holders) or self.protected_children > 0
