"""The radix trees, put together again from the records that can be believed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvd.children import NO_CHILDREN, Children
from kvd.metadata.records import BORN, DURATION, INFO, ROOT, TOKENS, TTL
from kvd.metadata.scan import Scan
from kvd.node import Node, Root
from kvd.radix_tree import RadixTree
from kvd.retention import NO_WISH, Retention
from kvd.session import Session
from kvd_shared.errors import BadRequest
from kvd_shared.refs import REF_BYTES

Pages = npt.NDArray[np.int64]


class Runs:
    """Pages that follow each other without a branch, and were published alike: the nodes to be.

    Run i is `order[starts[i]:stops[i]]` of the matchable pages, behind run `parents[i]` (-1: at the
    start of the prompt); a run comes after the one that it stands behind.
    """

    def __init__(self, found: Scan, rows: npt.NDArray[np.uint64]) -> None:
        count, parents = len(found.matchable), found.parents
        places = np.arange(count)
        alike = rows[found.matchable][:, [ROOT, DURATION, TTL, INFO]]
        behind = parents >= 0
        children = np.bincount(parents[behind], minlength=count)
        goes_on = behind & (children[parents] == 1)
        goes_on &= (alike == alike[parents]).all(axis=1)
        head = np.where(goes_on, parents, places)
        while not np.array_equal(further := head[head], head):
            head = further
        self.order: Pages = np.argsort(head, kind="stable")  # parents first, so runs in order too
        heads = np.flatnonzero(~goes_on)
        number = np.full(count, -1, dtype=np.int64)
        number[heads] = np.arange(len(heads))
        self.starts: Pages = np.searchsorted(head[self.order], heads)
        self.stops: Pages = np.append(self.starts[1:], count)
        above = parents[heads]
        self.parents: Pages = np.where(above >= 0, number[head[above]], -1)
        self.heads: Pages = found.matchable[heads]


def rebuild(tree: RadixTree, found: Scan, keeper: Session) -> Pages:
    """Puts the matchable pages into the empty tree, each held once by `keeper`, whose nodes are in
    the order of their publication. Returns those that found no place: two that claim the same one
    cannot both be right about where they stand, and whatever stands behind the second goes with it.
    """
    rows, pages = tree.meta.records.rows, found.matchable
    if not len(pages):
        return pages
    runs = Runs(found, rows)
    order = runs.order
    sorted_pages = pages[order]
    sorted_rows = rows[sorted_pages]
    refs = tree.meta.pages.current[sorted_pages].tobytes()
    step = tree.page_token_bytes
    tokens = sorted_rows[:, TOKENS:].view(np.uint8)[:, :step].tobytes()
    born_s = sorted_rows[:, BORN].view(np.float64)
    lengths = runs.stops - runs.starts
    mean_s = np.add.reduceat(born_s, runs.starts) / lengths
    info = rows[runs.heads, INFO]
    columns = zip(
        runs.starts.tolist(),
        runs.stops.tolist(),
        runs.parents.tolist(),
        rows[runs.heads, ROOT].tolist(),
        found.depths[order[runs.starts]].tolist(),
        mean_s.tolist(),
        (info & np.uint64(0xFFFF_FFFF)).tolist(),
        _wishes(rows[runs.heads]),
        strict=True,
    )
    roots: dict[int, Root] = {}
    nodes: list[Node | None] = []
    parents: list[Node] = []
    slots = tree.nodes_by_slot
    assert len(slots) == 1, "the tree is not empty"
    for start, stop, above, root_id, depth, born, publisher, wish in columns:
        root = roots.get(root_id)
        if root is None:
            namespace = found.roots[root_id]
            root = Root(namespace, tree.eviction.tenant_of(namespace), root_id)
            roots[root_id] = root
        parent = root.top if above < 0 else nodes[above]
        key = tokens[start * step : (start + 1) * step]
        if parent is None or wish is None or key in parent.children:
            nodes.append(None)
            continue
        node = Node(
            root,
            parent,
            bytearray(tokens[start * step : stop * step]),
            bytearray(refs[start * REF_BYTES : stop * REF_BYTES]),
            depth,
        )
        node.id, node.key = len(slots), key
        slots.append(node)
        if parent.children is NO_CHILDREN:
            parent.children = Children()
            parents.append(parent)
        parent.children[key] = node
        parent.protected_children += 1
        node.publisher, node.born_s, node.last_use_s = publisher, born, born
        node.retention, node.priority = wish, wish.priority
        node.holders = {keeper: 1}
        root.num_held += stop - start
        root.tenant.num_pages += stop - start
        nodes.append(node)
    for one in parents:
        one.children.sort()
    for root in roots.values():
        if root.top.children:
            tree.roots[root.namespace] = root
    by_page = np.repeat([node.id if node else 0 for node in nodes], lengths)
    tree.slots[sorted_pages] = by_page
    tree._depths_np[sorted_pages] = found.depths[order]
    here = [node for node in nodes if node is not None]
    keeper.nodes.update(dict.fromkeys(sorted(here, key=lambda node: node.born_s)))
    count = int(np.count_nonzero(by_page))
    tree.num_pages += count
    tree.num_held += count
    tree.num_holds += count
    return sorted_pages[by_page == 0]


def _wishes(rows: npt.NDArray[np.uint64]) -> list[Retention | None]:
    """What was wished for each row's page; None where that is no wish."""
    priorities = ((rows[:, INFO] >> np.uint64(48)) & np.uint64(0xFF)).tolist()
    durations = rows[:, DURATION].view(np.float64).tolist()
    ttls = rows[:, TTL].view(np.float64).tolist()
    known: dict[Any, Retention | None] = {(NO_WISH.priority, None, None): NO_WISH}
    found = []
    for priority, duration_s, ttl_s in zip(priorities, durations, ttls, strict=True):
        wish = (
            priority,
            None if math.isnan(duration_s) else duration_s,
            None if math.isnan(ttl_s) else ttl_s,
        )
        if wish not in known:
            try:
                known[wish] = Retention(priority=wish[0], duration_s=wish[1], ttl_s=wish[2])
            except BadRequest:
                known[wish] = None
        found.append(known[wish])
    return found
