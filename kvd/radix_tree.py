"""The compressed radix tree over token ids, one root a namespace, in whole pages.

Exactness is visible: an edge is followed only where its token ids equal the prompt's, compared as
bytes; children are keyed by the token ids of their first page, not by a hash of them.

Eviction order: `_unprotected` holds every unprotected node in the order in which its last hold
ended, and a child always before its parent, so its first entry is the least recently used leaf.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kvd.node import Node
from kvd.session import Session
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES, page_of, refs_from_bytes


@dataclass(frozen=True, slots=True)
class Span:
    """Pages [start, stop) of one node. Good until the tree is next changed."""

    node: Node
    start: int
    stop: int

    @property
    def refs(self) -> bytes:
        return self.node.refs[self.start * REF_BYTES : self.stop * REF_BYTES]


@dataclass(slots=True)
class Walk:
    """The longest prefix found: its pages in order, as spans of consecutive nodes."""

    spans: list[Span] = field(default_factory=list)
    num_pages: int = 0

    @property
    def refs(self) -> bytes:
        return b"".join([span.refs for span in self.spans])

    def add(self, node: Node, start: int, stop: int) -> None:
        if stop > start:
            self.spans.append(Span(node, start, stop))
            self.num_pages += stop - start


class RadixTree:
    """Nodes, holds on them, and the order in which they may be evicted.

    Invariants (`tree_check.check_tree`): a node other than a root has pages; a child's first page
    is its key; `_node_id_of` names the node that has a page; the unprotected nodes are exactly
    those in the eviction order, and `num_evictable` counts their pages; a namespace has a root
    exactly while it has pages.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_evictable = 0  # pages of unprotected nodes
        self.num_pages = 0  # pages of all nodes
        self._page_token_bytes = page_size * TOKEN_BYTES
        self._roots: dict[Namespace, Node] = {}
        self._nodes: dict[int, Node] = {}  # all but the roots
        self._next_id = 1
        self._node_id_of = np.zeros(num_pages, dtype=np.int64)  # 0: the page is not in the tree
        self._unprotected: OrderedDict[Node, None] = OrderedDict()

    # --- reading; changes nothing

    def walk(self, namespace: Namespace, tokens: bytes, max_pages: int) -> Walk:
        """The longest prefix of `tokens` in the tree, at most `max_pages`."""
        found, root = Walk(), self._roots.get(namespace)
        if root is not None:
            self._descend(root, tokens, max_pages, found)
        return found

    def walk_after(self, ref: int, tokens: bytes, max_pages: int) -> Walk:
        """Like `walk`, for the tokens that follow the page `ref`, which is in the tree."""
        node = self.node_of(ref)
        assert node is not None
        found, start = Walk(), index_of(node, ref) + 1
        same = self._common_pages(node, start, tokens, 0, max_pages)
        found.add(node, start, start + same)
        if start + same == node.num_pages:
            self._descend(node, tokens, max_pages, found)
        return found

    def _descend(self, node: Node, tokens: bytes, max_pages: int, found: Walk) -> None:
        step = self._page_token_bytes
        while (pages := found.num_pages) < max_pages:
            child = node.children.get(tokens[pages * step : (pages + 1) * step])
            if child is None:
                return
            length = child.num_pages
            if pages + length <= max_pages and tokens.startswith(child.tokens, pages * step):
                found.add(child, 0, length)
                node = child
            else:
                found.add(child, 0, self._common_pages(child, 0, tokens, pages, max_pages))
                return

    def _common_pages(
        self, node: Node, offset: int, tokens: bytes, pages: int, max_pages: int
    ) -> int:
        """How many pages of `node` from `offset` on equal `tokens` from page `pages` on."""
        edge = np.frombuffer(node.tokens, dtype="<i4")[offset * self.page_size :]
        rest = np.frombuffer(tokens, dtype="<i4")[pages * self.page_size :]
        length = min(len(edge), len(rest), (max_pages - pages) * self.page_size)
        differ = np.flatnonzero(edge[:length] != rest[:length])
        return (int(differ[0]) if len(differ) else length) // self.page_size

    def node_of(self, ref: int) -> Node | None:
        """The node that has exactly this page in this generation."""
        page = page_of(ref)
        if page >= len(self._node_id_of):
            return None
        node = self._nodes.get(int(self._node_id_of[page]))
        return node if node is not None and index_of(node, ref) >= 0 else None

    def span_at(self, refs: bytes, position: int) -> Span | None:
        """The longest run of `refs` from `position` on that lies in one node; None if the page
        there is not in the tree."""
        at = position * REF_BYTES
        ref = int.from_bytes(refs[at : at + REF_BYTES], "little", signed=True)
        node = self.node_of(ref)
        if node is None:
            return None
        start = index_of(node, ref)
        mine, theirs = node.refs[start * REF_BYTES :], refs[at : at + len(node.refs)]
        length = min(len(mine), len(theirs))
        if mine[:length] != theirs[:length]:
            differ = refs_from_bytes(mine[:length]) != refs_from_bytes(theirs[:length])
            length = int(np.argmax(differ)) * REF_BYTES
        return Span(node, start, start + length // REF_BYTES)

    def pieces(self, refs: bytes) -> Iterator[tuple[int, Span | None]]:
        """References in order, as (reference, span) with as many pages of one node as follow each
        other, or (reference, None) for a page outside the tree. Each piece is looked up when it is
        asked for, so the tree may be changed between two of them."""
        at = 0
        while raw := refs[at * REF_BYTES : (at + 1) * REF_BYTES]:
            span = self.span_at(refs, at)
            at += span.stop - span.start if span is not None else 1
            yield int.from_bytes(raw, "little", signed=True), span

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents before children."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    @property
    def num_namespaces(self) -> int:
        return len(self._roots)

    # --- holds

    def hold(self, span: Span, session: Session) -> None:
        """One hold more on the pages of a span; those before it are held, or its node is."""
        node = self._isolate(span)
        was_protected = node.protected
        node.holders[session] = node.holders.get(session, 0) + 1
        session.nodes[node] = None
        if not was_protected:
            self._protect(node)

    def release(self, span: Span, session: Session, now: float, count: int = 1) -> None:
        """`count` holds less on the pages of a span that the session holds at least as often."""
        node = self._isolate(span)
        left = node.holders[session] - count
        assert left >= 0
        if left:
            node.holders[session] = left
            return
        del node.holders[session]
        del session.nodes[node]
        if not node.protected:
            self._unprotect(node, now)

    def _protect(self, node: Node) -> None:
        """`node` has just become protected, and with it those ancestors that were not."""
        while node.parent is not None:
            self._unprotected.pop(node, None)  # absent when a hold has just cut it off an edge
            self.num_evictable -= node.num_pages
            parent, parent_was_protected = node.parent, node.parent.protected
            parent.protected_children += 1
            if parent_was_protected:
                return
            node = parent

    def _unprotect(self, node: Node, now: float) -> None:
        """`node` has just ceased to be protected, and with it those ancestors it alone protected.

        They follow it in the eviction order: children before parents.
        """
        while node.parent is not None:
            node.last_use_s = now
            self._unprotected[node] = None
            self.num_evictable += node.num_pages
            node = node.parent
            node.protected_children -= 1
            if node.protected:
                return

    # --- shape

    def insert(
        self,
        namespace: Namespace,
        after: int | None,
        tokens: bytes,
        refs: bytes,
        session: Session,
        count: int,
    ) -> None:
        """Put new pages behind the page `after` (None: at the root), held `count` times each.

        `after` is held, and nothing in the tree continues it with the first page's tokens.
        A leaf that the same session alone holds as often grows in place, so that publishing page
        by page does not make a chain.
        """
        length = len(refs) // REF_BYTES
        parent = self._end_at(namespace, after)
        self.num_pages += length
        if not parent.is_root and not parent.children and parent.holders == {session: count}:
            parent.tokens += tokens
            parent.refs += refs
            self._set_node(refs, parent)
            return
        node = self._new_node(parent, tokens, refs)
        node.holders[session] = count
        session.nodes[node] = None
        self.num_evictable += length  # _protect takes it off again, as it does for any node
        self._protect(node)

    def evict(self, num_pages: int) -> bytes:
        """Remove exactly `num_pages` of the least recently used pages; returns their references.

        The caller has checked that as many are evictable.
        """
        gone: list[bytes] = []
        self.num_evictable -= num_pages
        self.num_pages -= num_pages
        while num_pages > 0:
            leaf = next(iter(self._unprotected))
            assert not leaf.children, "an inner node came before its children in eviction order"
            take = min(num_pages, leaf.num_pages)
            keep = leaf.num_pages - take
            gone.append(leaf.refs[keep * REF_BYTES :])
            if keep:
                leaf.refs = leaf.refs[: keep * REF_BYTES]
                leaf.tokens = leaf.tokens[: keep * self._page_token_bytes]
            else:
                self._remove(leaf)
            num_pages -= take
        refs = b"".join(gone)
        self._set_node(refs, None)
        return refs

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        del self._unprotected[leaf], self._nodes[leaf.id], parent.children[self._key(leaf)]
        if parent.is_root and not parent.children:
            del self._roots[parent.namespace]

    def _end_at(self, namespace: Namespace, after: int | None) -> Node:
        """The node that ends with the page `after`, cut there if its edge goes on."""
        if after is None:
            root = self._roots.get(namespace)
            if root is None:
                root = self._roots[namespace] = Node(0, namespace, None, b"", b"")
            return root
        node = self.node_of(after)
        assert node is not None
        stop = index_of(node, after) + 1
        return node if stop == node.num_pages else self._split(node, stop)

    def _isolate(self, span: Span) -> Node:
        """The pages of a span as a node of their own."""
        whole_below = span.stop == span.node.num_pages
        node = span.node if whole_below else self._split(span.node, span.stop)
        if span.start > 0:
            self._split(node, span.start)
        return node

    def _split(self, node: Node, pages: int) -> Node:
        """Cut an edge behind `pages` and return its new upper part; `node` stays the lower one.

        The upper part of an unprotected node is left out of the eviction order: only `hold` cuts
        such a node, and protects that part at once.
        """
        parent, cut = node.parent, pages * self._page_token_bytes
        assert parent is not None
        upper = self._new_node(parent, node.tokens[:cut], node.refs[: pages * REF_BYTES])
        node.tokens, node.refs, node.parent = (
            node.tokens[cut:],
            node.refs[pages * REF_BYTES :],
            upper,
        )
        upper.children[self._key(node)] = node
        upper.last_use_s = node.last_use_s
        if node.protected:
            upper.protected_children = 1
            upper.holders = dict(node.holders)
            for session in upper.holders:
                session.nodes[upper] = None
        return upper

    def _new_node(self, parent: Node, tokens: bytes, refs: bytes) -> Node:
        node = Node(self._next_id, parent.namespace, parent, tokens, refs)
        self._next_id += 1
        self._nodes[node.id] = node
        parent.children[self._key(node)] = node
        self._set_node(refs, node)
        return node

    def _key(self, node: Node) -> bytes:
        return node.tokens[: self._page_token_bytes]

    def _set_node(self, refs: bytes, node: Node | None) -> None:
        self._node_id_of[refs_from_bytes(refs) & 0xFFFF_FFFF] = node.id if node else 0


def index_of(node: Node, ref: int) -> int:
    """Place of a page in a node's edge, -1 if it is not there."""
    packed = ref.to_bytes(REF_BYTES, "little", signed=True)
    if node.refs.endswith(packed):  # publishing continues behind the last page
        return node.num_pages - 1
    at = node.refs.find(packed)
    while at > 0 and at % REF_BYTES:  # the bytes of two neighbours can look like a third's
        at = node.refs.find(packed, at + 1)
    return at // REF_BYTES if at >= 0 else -1
