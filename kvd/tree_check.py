"""The radix tree's invariants, asserted node by node. O(pages): for tests and `audit`."""

from __future__ import annotations

import numpy as np

from kvd.node import Node
from kvd.radix_tree import RadixTree
from kvd_shared.refs import TOKEN_BYTES, refs_from_bytes


def check_tree(tree: RadixTree) -> None:
    """Raises AssertionError at the first invariant that does not hold."""
    counted = evictable = 0
    seen: dict[int, Node] = {}
    unprotected: set[Node] = set()
    step = tree.page_size * TOKEN_BYTES
    roots = list(tree._roots.values())
    assert all(root.children for root in roots), "a namespace without pages has a root"
    stack = list(roots)
    while stack:
        node = stack.pop()
        for key, child in node.children.items():
            assert child.parent is node and child.num_pages > 0
            assert child.namespace == node.namespace
            assert len(child.tokens) == child.num_pages * step
            assert key == child.tokens[:step], "a child is filed under another first page"
            pages = refs_from_bytes(child.refs) & 0xFFFF_FFFF
            assert (tree._node_id_of[pages] == child.id).all(), f"node {child.id} lost a page"
            for session, count in child.holders.items():
                assert count > 0 and child in session.nodes
            seen[child.id] = child
            counted += child.num_pages
            if not child.protected:
                unprotected.add(child)
                evictable += child.num_pages
            stack.append(child)
        protected = sum(child.protected for child in node.children.values())
        assert node.protected_children == protected, (
            f"node {node.id} counts {node.protected_children} protected children, has {protected}"
        )
    assert seen == tree._nodes
    assert unprotected == tree._unprotected.keys(), "eviction order is not the unprotected nodes"
    assert (counted, evictable) == (tree.num_pages, tree.num_evictable), (
        f"{counted} pages, {evictable} evictable; counted {tree.num_pages}, {tree.num_evictable}"
    )
    assert int(np.count_nonzero(tree._node_id_of)) == counted
    place = {node: i for i, node in enumerate(tree._unprotected)}
    for node, i in place.items():
        parent = node.parent
        assert parent not in place or place[parent] > i, "a parent is evicted before its child"
