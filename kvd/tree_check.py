"""The radix tree's invariants, asserted node by node. O(pages): for tests."""

from __future__ import annotations

import numpy as np

from kvd.node import Node, Root
from kvd.radix_tree import RadixTree
from kvd_shared.refs import TOKEN_BYTES, refs_from_bytes


def check_tree(tree: RadixTree) -> None:
    """Raises AssertionError at the first invariant that does not hold."""
    for root in tree.roots.values():
        assert root.live and root.top.children, "a namespace without pages has a root"
        assert tree.roots[root.namespace] is root
    ordered = list(tree.eviction.in_order())
    assert len(set(ordered)) == len(ordered), "a node stands in two eviction orders"
    counted = evictable = held = shared = holds = detached = 0
    by_tenant = dict.fromkeys(tree.eviction.tenants, 0)
    by_root: dict[Root, int] = {}
    for slot, node in enumerate(tree.nodes_by_slot):
        if node is None:
            continue
        assert node.id == slot
        check_node(tree, node)
        pages = node.num_pages
        counted += pages
        by_tenant[node.root.tenant] += pages
        if node.holders:
            held += pages
            by_root[node.root] = by_root.get(node.root, 0) + pages
            shared += pages if len(node.holders) > 1 else 0
            holds += pages * sum(node.holders.values())
            detached += 0 if node.root.live else pages
        evictable += 0 if node.protected else pages
        if node.order is not None:
            assert not node.protected
            assert node in ordered
        elif not node.protected and node.root.live and not node.children:
            raise AssertionError(f"{node} can be evicted and stands in no order")
    assert all(node.order is not None for node in ordered)
    assert len(ordered) == sum(n.order is not None for n in tree.nodes())
    for root, pages in by_root.items():
        assert root.num_held == pages
    ours = (counted, evictable, held, shared, holds, detached)
    theirs = (
        tree.num_pages,
        tree.num_evictable,
        tree.num_held,
        tree.num_shared,
        tree.num_holds,
        tree.num_detached,
    )
    assert ours == theirs, (
        f"(in the tree, evictable, held, shared, holds, detached): counted {ours}, kept {theirs}"
    )
    assert all(tenant.num_pages == pages for tenant, pages in by_tenant.items())
    assert int(np.count_nonzero(tree.slots)) == counted
    free = set(tree._free_slots)
    assert len(free) == len(tree._free_slots)
    assert free == {i for i, n in enumerate(tree.nodes_by_slot) if n is None} - {0}


def check_node(tree: RadixTree, node: Node) -> None:
    """What must hold between a node, its parent, its children and its pages at any moment."""
    step = tree.page_size * TOKEN_BYTES
    parent = node.parent
    assert parent is not None and node.num_pages > 0
    assert len(node.tokens) == node.num_pages * step
    assert node.tokens.startswith(node.key) and len(node.key) == step
    assert parent.children.get(node.key) is node, f"{node} is filed under another page"
    assert parent.parent is None or node.depth == parent.end
    assert node.root.namespace == parent.root.namespace
    pages = refs_from_bytes(bytes(node.refs)) & 0xFFFF_FFFF
    assert (tree.slots[pages] == node.id).all(), f"{node} lost a page"
    assert (tree._depths_np[pages] == np.arange(node.depth, node.end)).all()
    for session, count in node.holders.items():
        assert count > 0 and node in session.nodes
    if node.children.order is not None:
        keys = [*node.children, *node.children.garbage]
        assert list(node.children.order) == sorted(keys)
    protected = sum(child.protected for child in node.children.values())
    assert node.protected_children == protected, (
        f"{node} counts {node.protected_children} protected children, has {protected}"
    )
