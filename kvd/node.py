"""A node of the radix tree: one edge of whole pages, who holds it, and what is known of its use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvd.children import NO_CHILDREN, Children
from kvd.retention import NO_WISH, Retention
from kvd_shared.namespace import Namespace

if TYPE_CHECKING:
    from kvd.eviction import Tenant
    from kvd.policies import Policy
    from kvd.session import Session

NOBODY: dict[Session, int] = {}  # the holders of every unheld node; nothing is ever added to it
NEVER = math.inf


class Root:
    """One namespace's tree. `live` until it is flushed or its weights version is raised: then its
    pages can be matched no longer, and `left` says why."""

    __slots__ = ("id", "left", "live", "namespace", "num_held", "tenant", "top")

    def __init__(self, namespace: Namespace, tenant: Tenant, root_id: int = 0) -> None:
        self.id = root_id  # in the metadata; 0: not recorded
        self.namespace = namespace
        self.tenant = tenant
        self.live = True
        self.left = "evicted"  # while it lives, pages leave by eviction
        self.num_held = 0  # pages that a session holds
        self.top = Node(self, None, bytearray(), bytearray(), 0)


class Node:
    """The run of pages between two branch points below one namespace's root.

    Every page of a node is held by the same sessions equally often and has the same retention: an
    operation that would make them differ splits the node first. So a hold costs one entry a node,
    however long its edge is.

    A node is *protected* when it is held or has a protected child. Unprotected nodes, and only
    they, may be evicted.
    """

    __slots__ = (
        "born_s",
        "children",
        "depth",
        "expires_s",
        "hits",
        "holders",
        "id",
        "key",
        "last_use_s",
        "order",
        "parent",
        "priority",
        "priority_until_s",
        "protected_children",
        "publisher",
        "rank",
        "refs",
        "retention",
        "root",
        "timer_s",
        "tokens",
    )

    def __init__(
        self, root: Root, parent: Node | None, tokens: bytearray, refs: bytearray, depth: int
    ) -> None:
        self.id = 0  # its slot in the tree's table; 0: not in the tree, or a root's top
        self.root = root
        self.parent = parent  # None for a root's top
        self.tokens = tokens  # int32 token ids, a whole number of pages
        self.key = b""  # the tokens of its first page, under which its parent has it
        self.refs = refs  # int64 page references, as many
        self.depth = depth  # pages of the prompt that come before
        self.children: Children = NO_CHILDREN
        self.holders: dict[Session, int] = NOBODY  # how often it holds each page
        self.protected_children = 0  # of children
        self.publisher = 0  # id of the session that published it
        self.hits = 0  # how often a match has held it
        self.born_s = 0.0  # when its pages were published, on average
        self.last_use_s = 0.0  # when the last hold ended; meaningful while unheld
        self.retention: Retention = NO_WISH
        self.priority = NO_WISH.priority  # now: the wish's, or the default again
        self.priority_until_s = NEVER
        self.expires_s = NEVER  # it cannot be matched from then on, unless protected
        self.timer_s = NEVER  # when the tree's timers look at it next
        self.order: Policy | None = None  # the eviction order that it stands in
        self.rank: Any = None  # the eviction policy's own

    @property
    def num_pages(self) -> int:
        return len(self.refs) >> 3

    @property
    def end(self) -> int:
        """Pages of the prompt up to its end."""
        return self.depth + (len(self.refs) >> 3)

    @property
    def namespace(self) -> Namespace:
        return self.root.namespace

    @property
    def protected(self) -> bool:
        return bool(self.holders) or self.protected_children > 0

    @property
    def last_ref(self) -> int | None:
        """Its last page; None for a root's top."""
        return int.from_bytes(self.refs[-8:], "little", signed=True) if self.refs else None

    def __repr__(self) -> str:
        return f"<node {self.id}: pages {self.depth} to {self.end}>"
