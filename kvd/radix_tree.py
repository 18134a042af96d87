"""The compressed radix tree over token ids, one root a namespace, in whole pages.

TreeShape ◄─── TreeReading ◄─── TreeLeaving ◄─── RadixTree
nodes, cuts,   the longest      eviction,        holds,
joins          prefix           expiry           growth
"""

from __future__ import annotations

from kvd.metadata import Metadata
from kvd.node import NEVER, NOBODY, Node, Root
from kvd.options import CacheOptions
from kvd.retention import NO_WISH, Retention
from kvd.session import Session
from kvd.tree_leaving import TreeLeaving
from kvd.tree_reading import Span
from kvd.tree_shape import PAGE_MASK
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES

JOIN_PAGES = 1024  # longer edges are not joined to the one above: copying them would take longer
JOIN_CHILDREN = 64  # nor those with more children, each of which has to be told


class RadixTree(TreeLeaving):
    """Who holds what of the tree, and how it grows.

    Invariants (`tree_check.check_tree`): those of its parts; a node is protected while it is held
    or has a protected child; the counts of pages say what they say.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        options: CacheOptions,
        meta: Metadata | None = None,
    ) -> None:
        super().__init__(
            num_pages,
            page_size,
            options,
            Metadata.in_memory(num_pages, page_size) if meta is None else meta,
        )
        self.num_held = 0  # pages that a session holds
        self.num_shared = 0  # pages that two sessions or more hold
        self.num_holds = 0  # the holds on all pages
        self._newborn = Root(Namespace(model=""), self.eviction.tenants[0]).top

    # --- holds

    def hold(self, span: Span, session: Session, *, hit: bool = False, join: bool = True) -> Node:
        """One hold more on the pages of a span; those before it are held, or its node is. Returns
        the node that now has the span's pages. `hit`: a match is the reason. `join`: let them be
        one node with those before, if nothing tells them apart."""
        node = self._isolate(span)
        node.hits += hit
        pages, holders, parent = len(node.refs) >> 3, node.holders, node.parent
        assert parent is not None
        self.num_holds += pages
        if session in holders:
            holders[session] += 1
        else:
            was_protected = bool(holders) or node.protected_children > 0
            if holders:
                holders[session] = 1
                self.num_shared += pages if len(holders) == 2 else 0
            else:
                node.holders = {session: 1}
                self._count_held(node.root, pages)
            session.nodes[node] = None
            if not was_protected:
                self._protect(node)
        if join and len(parent.children) == 1 and self._joins(parent, node):
            return self._join(parent, node)
        return node

    def release(self, span: Span, session: Session, now: float, count: int = 1) -> None:
        """`count` holds less on the pages of a span that the session holds at least as often."""
        node = self._isolate(span)
        pages, holders = len(node.refs) >> 3, node.holders
        self.num_holds -= pages * count
        left = holders[session] - count
        assert left >= 0
        if left:
            holders[session] = left
            return
        del holders[session], session.nodes[node]
        if holders:
            self.num_shared -= pages if len(holders) == 1 else 0
            return
        node.holders = NOBODY
        self._count_held(node.root, -pages)
        if not node.protected_children:
            self._unprotect(node, now)

    def _count_held(self, root: Root, pages: int) -> None:
        self.num_held += pages
        root.num_held += pages
        if not root.live:
            self.num_detached += pages

    def retain(self, span: Span, retention: Retention) -> None:
        """Let a wish hold for the pages of a span, which the caller holds."""
        node = self._isolate(span)
        self.meta.records.retained(node.refs, retention)
        node.retention, node.priority = retention, retention.priority
        node.priority_until_s = node.expires_s = NEVER  # until its last hold ends

    def _protect(self, node: Node) -> None:
        """`node` has just become protected, and with it those ancestors that were not."""
        parent = node.parent
        while parent is not None:
            if node.order is not None:
                node.order.discard(node)
                node.order = None
            self.num_evictable -= len(node.refs) >> 3
            parent.protected_children += 1
            if parent.protected_children > 1 or parent.holders:
                return
            node, parent = parent, parent.parent

    def _unprotect(self, node: Node, now: float) -> None:
        """`node` has just ceased to be protected, and with it those ancestors it alone protected.

        They follow it in the eviction order: children before parents. What was released together
        and cannot be told apart becomes one node again.
        """
        pages = len(node.refs) >> 3
        while True:
            parent = node.parent
            assert parent is not None
            self.num_evictable += pages
            node.last_use_s = now
            if node.retention is not NO_WISH or node.root.tenant.ttl_s is not None:
                self._start_timers(node, now)
            parent.protected_children -= 1
            pages = parent.num_pages
            upwards = not (parent.protected_children or parent.holders or parent.parent is None)
            if upwards and len(parent.children) == 1 and self._joins(parent, node):
                self._absorb(parent, node)
            elif node.root.live:
                self.eviction.add(node)
            else:
                self._doomed.append(([node], node.root.left))
            if not upwards:
                return
            node = parent

    def _joins(self, parent: Node, child: Node) -> bool:
        """Does nothing tell an only child from its parent, and is joining them cheap?"""
        return (
            parent.parent is not None
            and parent.root.live  # else `_doomed` may name both
            and parent.holders == child.holders
            and parent.publisher == child.publisher
            and (parent.retention is child.retention or parent.retention == child.retention)
            and parent.priority == child.priority
            and parent.priority_until_s == child.priority_until_s
            and child.num_pages <= JOIN_PAGES
            and len(child.children) <= JOIN_CHILDREN
            and self.eviction.alike(parent, child)
        )

    def _join(self, parent: Node, child: Node) -> Node:
        """Join two nodes that are held alike."""
        for session in child.holders:
            del session.nodes[child]
        self._absorb(parent, child)
        return parent

    # --- growing

    def insert(
        self,
        namespace: Namespace,
        after: int | None,
        tokens: bytes,
        refs: bytes,
        session: Session,
        count: int,
        retention: Retention,
        now: float,
    ) -> None:
        """Put new pages behind the page `after` (None: at the root), held `count` times each.

        `after` is held, and nothing that can be matched continues it with the first page's tokens.
        A leaf that the same session alone holds as often grows in place, so that publishing page
        by page does not make a chain.
        """
        length = len(refs) // REF_BYTES
        parent = self._end_at(namespace, after)
        root = parent.root
        root.tenant.num_pages += length
        self.num_pages += length
        self._count_held(root, length)
        self.num_holds += length * count
        if self.observer is not None:
            self.observer.stored(namespace, after, tokens, refs)
        if not parent.children and self._grows(parent, session, count, retention):
            pages = parent.num_pages
            parent.born_s = (parent.born_s * pages + now * length) / (pages + length)
            self._grow(parent, tokens, refs)
            self.meta.records.published(refs, after, root.id, tokens, session.id, now, retention)
            return
        old = parent.children.get(tokens[: self.page_token_bytes])
        if old is not None:
            self._doom(old, "expired")
            if not root.top.children:  # it was the last of this root, which has gone with it
                root.id = self.meta.roots.added(namespace)
                self.roots[namespace] = root
        node = Node(root, parent, bytearray(tokens), bytearray(refs), parent.end)
        self._attach(node, parent)
        self._set_places(refs, node.id, node.depth)
        self.meta.records.published(refs, after, root.id, tokens, session.id, now, retention)
        node.publisher, node.born_s, node.holders = session.id, now, {session: count}
        node.retention, node.priority = retention, retention.priority
        session.nodes[node] = None
        self.num_evictable += length  # _protect takes it off again, as it does for any node
        self._protect(node)

    def _grows(self, leaf: Node, session: Session, count: int, retention: Retention) -> bool:
        return (
            leaf.parent is not None
            and leaf.publisher == session.id
            and len(leaf.holders) == 1
            and leaf.holders.get(session) == count
            and (leaf.retention is retention or leaf.retention == retention)
            and leaf.priority == retention.priority
            and leaf.priority_until_s == NEVER
            and (not leaf.hits or self.eviction.alike(leaf, self._newborn))
        )

    def _end_at(self, namespace: Namespace, after: int | None) -> Node:
        """The node that ends with the page `after`, cut there if its edge goes on."""
        if after is None:
            root = self.roots.get(namespace)
            if root is None:
                tenant = self.eviction.tenant_of(namespace)
                root = Root(namespace, tenant, self.meta.roots.added(namespace))
                self.roots[namespace] = root
            return root.top
        node = self.node_of(after)
        assert node is not None
        stop = self.depth_of(after & PAGE_MASK) + 1
        return node if stop == node.end else self._split(node, stop)

    def _isolate(self, span: Span) -> Node:
        """The pages of a span as a node of their own."""
        node = span.node
        if self.observer is not None and not node.root.live:
            self.observer.removed(bytes(node.refs))  # of what is cut off, nothing will remind us
        if span.stop < node.end:
            node = self._split(node, span.stop)
        if span.start > node.depth:
            self._split(node, span.start)
        return node
