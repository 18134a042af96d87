"""Finding a prompt's prefix in the tree. Nothing here changes it.

Exactness is visible: an edge is followed only where its token ids equal the prompt's, compared as
bytes; children are keyed by the token ids of their first page, not by a hash of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvd.node import Node
from kvd.prefix import common_units
from kvd.tree_shape import TreeShape
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES


class Span:
    """The pages of one node that lie at [start, stop) of the prompt. Good until the tree is next
    changed."""

    __slots__ = ("node", "start", "stop")

    def __init__(self, node: Node, start: int, stop: int) -> None:
        self.node = node
        self.start = start
        self.stop = stop

    @property
    def refs(self) -> bytes | bytearray:
        node = self.node
        if self.stop - self.start == node.num_pages:
            return node.refs
        first = self.start - node.depth
        return node.refs[first * REF_BYTES : (self.stop - node.depth) * REF_BYTES]


class Walk:
    """The longest prefix found: its pages in order, as spans of consecutive nodes."""

    __slots__ = ("last", "num_pages", "spans")

    def __init__(self, last: Node | None = None) -> None:
        self.spans: list[Span] = []
        self.num_pages = 0
        self.last = last  # the node in which the walk ended, None if the namespace has none

    @property
    def refs(self) -> bytes:
        return b"".join([span.refs for span in self.spans])

    def add(self, node: Node, start: int, stop: int) -> None:
        if stop > start:
            self.spans.append(Span(node, start, stop))
            self.num_pages += stop - start


class TreeReading(TreeShape):
    """Invariants: TreeShape's."""

    def walk(self, namespace: Namespace, tokens: bytes, max_pages: int, now: float) -> Walk:
        """The longest prefix of `tokens` in the tree, at most `max_pages`."""
        found, root = Walk(), self.roots.get(namespace)
        if root is not None:
            self._descend(root.top, tokens, max_pages, found, now)
        return found

    def walk_from(self, node: Node, start: int, tokens: bytes, max_pages: int, now: float) -> Walk:
        """Like `walk`, for the tokens that follow the first `start` pages of the prompt, the last
        of which is the node's."""
        found = Walk(node)
        same = 0
        if limit := min(node.end - start, max_pages):
            at = (start - node.depth) * self.page_token_bytes
            same = common_units(node.tokens, at, tokens, 0, limit, self.page_token_bytes)
            found.add(node, start, start + same)
        if start + same == node.end and node.children:
            self._descend(node, tokens, max_pages, found, now)
        return found

    def _descend(self, node: Node, tokens: bytes, max_pages: int, found: Walk, now: float) -> None:
        step = self.page_token_bytes
        pages = found.num_pages
        found.last = node
        while pages < max_pages:
            child = node.children.get(tokens[pages * step : (pages + 1) * step])
            if child is None or (child.expires_s <= now and not child.protected):
                return
            found.last = child
            depth, length = child.depth, child.num_pages
            if pages + length <= max_pages and tokens.startswith(child.tokens, pages * step):
                found.spans.append(Span(child, depth, depth + length))
                pages = found.num_pages = pages + length
                node = child
                continue
            limit = min(length, max_pages - pages)
            same = common_units(child.tokens, 0, tokens, pages * step, limit, step)
            found.add(child, depth, depth + same)
            return

    def partial(
        self, walk: Walk, tokens: bytes, max_tokens: int, now: float
    ) -> tuple[Node, int, int] | None:
        """The page that continues a walk from the prompt's start with the most of the tokens up to
        `max_tokens`, as (node, its place in the prompt, how many tokens); None if none does."""
        node, matched = walk.last, walk.num_pages
        first = matched * self.page_size
        rest = tokens[first * TOKEN_BYTES : min(first + self.page_size, max_tokens) * TOKEN_BYTES]
        if node is None or not rest:
            return None
        if node.end > matched:
            at = (matched - node.depth) * self.page_token_bytes
            limit = len(rest) // TOKEN_BYTES
            same = common_units(node.tokens, at, rest, 0, limit, TOKEN_BYTES)
            return (node, matched, same) if same else None
        best = node.children.nearest(rest, lambda n: n.protected or n.expires_s > now)
        return (best[0], matched, best[1]) if best else None

    def span_at(self, refs: bytes, position: int) -> Span | None:
        """The longest run of `refs` from `position` on that lies in one node; None if the page
        there is not in the tree."""
        at = position * REF_BYTES
        page = int.from_bytes(refs[at : at + 4], "little")
        slot = self._slots[page] if page < len(self._slots) else 0
        node = self.nodes_by_slot[slot]
        if node is None:
            return None
        start, edge = self._depths[page], node.refs
        first = (start - node.depth) * REF_BYTES
        if not first and refs.startswith(edge, at):
            return Span(node, start, start + (len(edge) >> 3))
        limit = min(len(edge) - first, len(refs) - at) // REF_BYTES
        same = common_units(edge, first, refs, at, limit, REF_BYTES)
        return Span(node, start, start + same) if same else None  # else of another generation

    def pieces(self, refs: bytes) -> Iterator[tuple[int, Span | None]]:
        """References in order, as (reference, span) with as many pages of one node as follow each
        other, or (reference, None) for a page outside the tree. Each piece is looked up when it is
        asked for, so the tree may be changed between two of them."""
        at, count = 0, len(refs) // REF_BYTES
        while at < count:
            raw = refs[at * REF_BYTES : (at + 1) * REF_BYTES]
            span = self.span_at(refs, at)
            at += span.stop - span.start if span is not None else 1
            yield int.from_bytes(raw, "little", signed=True), span

    def nodes(self) -> Iterator[Node]:
        """All nodes of live and of doomed trees, in no order."""
        for node in self.nodes_by_slot:
            if node is not None:
                yield node

    @property
    def num_namespaces(self) -> int:
        return len(self.roots)
