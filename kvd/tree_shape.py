"""The shape of the radix tree: nodes, their slots, and the place of every page in it.

Only growth, cuts and joins are here; who holds what, and what may be evicted, is in radix_tree.py.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from kvd.children import NO_CHILDREN, Children
from kvd.node import Node, Root
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES

PAGE_MASK = 0xFFFF_FFFF
FEW = 24  # pages: so many are done one by one, which is quicker than numpy for them


class TreeShape:
    """Invariants (`tree_check.check_tree`): a node other than a root's top has pages; a child's
    first page is its key; `nodes_by_slot[node.id]` is the node, and free slots are None; the slot
    and depth of a page name the node that has it and its place on the way from the prompt's start.

    A page's depth never changes while it is in the tree: cuts and joins only move it to another
    node, and of the two nodes of a cut the upper one is new, so that handles on the end of a path
    stay good.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0  # pages of all nodes
        self.nodes_by_slot: list[Node | None] = [None]  # slot 0 means: no node
        self.roots: dict[Namespace, Root] = {}  # the live ones, each with pages
        self.page_token_bytes = page_size * TOKEN_BYTES
        self._free_slots: list[int] = []
        self._slots = array("i", bytes(4 * num_pages))  # by page; 0: the page is not in the tree
        self._depths = array("i", bytes(4 * num_pages))
        # The same memory, for many pages at once; single ones are quicker through the arrays.
        self.slots: npt.NDArray[np.int32] = np.frombuffer(self._slots, dtype=np.int32)
        self._depths_np = np.frombuffer(self._depths, dtype=np.int32)

    def node_of(self, ref: int) -> Node | None:
        """The node that has exactly this page in this generation."""
        page = ref & PAGE_MASK
        if page >= len(self._slots):
            return None
        node = self.nodes_by_slot[self._slots[page]]
        if node is None:
            return None
        at = (self._depths[page] - node.depth) * REF_BYTES
        same = node.refs[at : at + REF_BYTES] == ref.to_bytes(REF_BYTES, "little", signed=True)
        return node if same else None

    def depth_of(self, page: int) -> int:
        """Pages of the prompt before this page, which is in the tree."""
        return self._depths[page]

    def _attach(self, node: Node, parent: Node) -> None:
        """Give a new node its slot and itself to its parent; its pages' slots are set by the
        caller."""
        if self._free_slots:
            node.id = self._free_slots.pop()
            self.nodes_by_slot[node.id] = node
        else:
            node.id = len(self.nodes_by_slot)
            self.nodes_by_slot.append(node)
        node.key = bytes(node.tokens[: self.page_token_bytes])
        self._adopt(parent, node)

    def _adopt(self, parent: Node, child: Node) -> None:
        if parent.children is NO_CHILDREN:
            parent.children = Children()
        parent.children.add(child.key, child)
        child.parent = parent

    def _disown(self, parent: Node, key: bytes) -> None:
        parent.children.remove(key)
        if not parent.children:
            parent.children = NO_CHILDREN

    def _set_slots(self, refs: bytes | bytearray, slot: int) -> None:
        if len(refs) <= FEW * REF_BYTES:
            for ref in array("q", bytes(refs)):
                self._slots[ref & PAGE_MASK] = slot
        else:
            self.slots[np.frombuffer(refs, dtype="<i8") & PAGE_MASK] = slot

    def _set_places(self, refs: bytes | bytearray, slot: int, depth: int) -> None:
        if len(refs) <= FEW * REF_BYTES:
            for ref in array("q", bytes(refs)):
                page = ref & PAGE_MASK
                self._slots[page] = slot
                self._depths[page] = depth
                depth += 1
        else:
            pages = np.frombuffer(refs, dtype="<i8") & PAGE_MASK
            self.slots[pages] = slot
            self._depths_np[pages] = np.arange(depth, depth + len(pages), dtype=np.int32)

    def _grow(self, leaf: Node, tokens: bytes, refs: bytes) -> None:
        """Append pages to a leaf's edge. The edge grows in place: no copy of what is there."""
        self._set_places(refs, leaf.id, leaf.end)
        leaf.tokens += tokens
        leaf.refs += refs

    def _split(self, node: Node, depth: int) -> Node:
        """Cut an edge at `depth` and return its new upper part; `node` stays the lower one."""
        parent, pages = node.parent, depth - node.depth
        assert parent is not None and 0 < pages < node.num_pages
        token_bytes, ref_bytes = pages * self.page_token_bytes, pages * REF_BYTES
        upper = Node(
            node.root, parent, node.tokens[:token_bytes], node.refs[:ref_bytes], node.depth
        )
        for name in _INHERITED:
            setattr(upper, name, getattr(node, name))
        self._attach(upper, parent)  # in the place of `node`: both have the same key
        self._set_slots(upper.refs, upper.id)
        del node.tokens[:token_bytes]  # moves a pointer, copies nothing
        del node.refs[:ref_bytes]
        node.depth = depth
        node.key = bytes(node.tokens[: self.page_token_bytes])
        self._adopt(upper, node)
        if node.protected:
            upper.protected_children = 1
        if node.holders:
            upper.holders = dict(node.holders)
            for session in upper.holders:
                session.nodes[upper] = None
        return upper

    def _absorb(self, parent: Node, child: Node) -> None:
        """Join an only child to its parent's edge. The caller has seen that nothing tells them
        apart, and takes the child out of what else names it."""
        self._set_slots(child.refs, parent.id)
        pages, more = parent.num_pages, child.num_pages
        parent.born_s = (parent.born_s * pages + child.born_s * more) / (pages + more)
        parent.tokens += child.tokens
        parent.refs += child.refs
        parent.protected_children = child.protected_children
        parent.children, child.children = child.children, NO_CHILDREN
        for grandchild in parent.children.values():
            grandchild.parent = parent
        self._forget(child)

    def _forget(self, node: Node) -> None:
        """The node is no longer part of the tree; its slot can be another's."""
        self.nodes_by_slot[node.id] = None
        self._free_slots.append(node.id)
        node.id = 0
        node.parent = None


_INHERITED = (
    "publisher",
    "hits",
    "born_s",
    "last_use_s",
    "retention",
    "priority",
    "priority_until_s",
    "expires_s",
)
