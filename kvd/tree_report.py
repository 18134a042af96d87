"""The radix tree as operators see it: shapes, holders and digests; tokens only where permitted."""

from __future__ import annotations

from array import array
from itertools import islice

from kvd.arguments import Arguments
from kvd.cache import CacheManager
from kvd.daemon import Daemon
from kvd.node import NEVER, Node
from kvd.report_parts import (
    HASHED_A_SLICE,
    Result,
    Sliced,
    named_pool,
    sliced_digest,
    space_to_wire,
)
from kvd_shared.errors import BadRequest
from kvd_shared.refs import TOKEN_BYTES

NODES_A_SLICE = 50
SHOWN_TOKENS = 16  # of each node, where they may be shown
MAX_TREE_NODES = 1_000  # encoding so many takes a millisecond, which is one turn


def tree(daemon: Daemon, args: Arguments, now: float, *, show_tokens: bool = False) -> Sliced:
    pool, limit = named_pool(daemon, args), args.number("max_nodes")
    args.done()
    if not 1 <= limit <= MAX_TREE_NODES:
        raise BadRequest(f"tree: max_nodes = {limit} must be from 1 to {MAX_TREE_NODES}")
    spaces: list[Result] = []
    left = limit + 1
    hashed = 0  # bytes, since the last slice
    for root in list(islice(pool.cache.tree.roots.values(), left)):
        nodes: list[Result] = []
        stack: list[tuple[Node, int | None, str]] = [
            (node, None, "") for node in islice(root.top.children.values(), left)
        ]
        while stack and left > 1:
            node, parent, above = stack.pop()
            if not node.id:  # it has left the tree between two slices
                continue
            left -= 1
            shown = _node(pool.cache, node, parent, now)
            below = list(islice(node.children.values(), left))
            number = node.id
            hashed += len(node.tokens)
            shown["digest"] = yield from sliced_digest(above, bytes(node.tokens))
            if show_tokens:
                first = bytes(node.tokens[: SHOWN_TOKENS * TOKEN_BYTES])
                shown["first_tokens"] = array("i", first).tolist()
            nodes.append(shown)
            stack += [(child, number, shown["digest"]) for child in below]
            if left % NODES_A_SLICE == 0 or hashed > HASHED_A_SLICE:
                hashed = 0
                yield
        spaces.append(space_to_wire(root.namespace) | {"nodes": nodes})
        if stack:
            left = 0
            break
    return {
        "pool": pool.name,
        "page_size": pool.cache.page_size,
        "truncated": left == 0 or len(pool.cache.tree.roots) > len(spaces),
        "namespaces": [space for space in spaces if space["nodes"]],
    }


def _node(cache: CacheManager, node: Node, parent: int | None, now: float) -> Result:
    return {
        "id": node.id,
        "parent": parent,
        "pages": node.num_pages,
        "tokens": node.num_pages * cache.page_size,
        "holders": len(node.holders),
        "hits": node.hits,
        "priority": node.priority,
        "last_use_s": None if node.protected else now - node.last_use_s,
        "expires_s": None if node.protected or node.expires_s == NEVER else node.expires_s - now,
    }
