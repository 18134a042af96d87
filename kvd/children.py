"""One node's children: found by their exact first page, or by the page most like a given one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

from kvd_shared.refs import TOKEN_BYTES

if TYPE_CHECKING:
    from kvd.node import Node

FEW = 8  # up to so many are looked at one by one; beyond, they are kept in order


class Children(dict[bytes, "Node"]):
    """Children by the token ids of their first page, exactly.

    Invariant: `order` is None, or holds exactly the keys and the `garbage`, sorted; it is there
    when there are more than FEW. Garbage are keys of children that are gone: taking a key out of
    the order costs several times what an eviction does, so it is left to later additions; many a
    child comes back before, with the next turn of its conversation. There is hardly more garbage
    than there are keys.
    """

    __slots__ = ("garbage", "order")

    def __init__(self) -> None:
        super().__init__()
        self.order: SortedList | None = None
        self.garbage: set[bytes] = set()

    def add(self, key: bytes, child: Node) -> None:
        """Also in the place of another child with the same key."""
        known = key in self
        self[key] = child
        if known:
            return
        if self.order is None:
            if len(self) > FEW:
                self.order = SortedList(self)
            return
        if key in self.garbage:
            self.garbage.remove(key)
        else:
            self.order.add(key)
        if len(self.garbage) > len(self):
            for _ in range(2):  # two for one: it shrinks
                self.order.remove(self.garbage.pop())

    def sort(self) -> None:
        """After many were put in as into any dict."""
        if len(self) > FEW:
            self.order = SortedList(self)

    def remove(self, key: bytes) -> None:
        del self[key]
        if self.order is not None:
            if len(self) <= FEW:
                self.order, self.garbage = None, set()
            else:
                self.garbage.add(key)

    def nearest(self, tokens: bytes, usable: Callable[[Node], bool]) -> tuple[Node, int] | None:
        """The usable child whose first page begins with the most of `tokens` (at most a page of
        them), and how many tokens those are. None if not even one token agrees.

        In the order of their bytes, keys that share more with `tokens` are nearer to the place of
        `tokens`, so the nearest usable neighbour on either side is the best of its side.
        """
        best: tuple[Node, int] | None = None
        for key in self if self.order is None else self._neighbours(tokens, usable):
            same = _common_tokens(key, tokens)
            if same > (best[1] if best else 0) and usable(self[key]):
                best = self[key], same
        return best

    def _neighbours(self, tokens: bytes, usable: Callable[[Node], bool]) -> list[bytes]:
        assert self.order is not None
        place = self.order.bisect_left(tokens)
        found = []
        for places in (range(place, len(self.order)), range(place - 1, -1, -1)):
            for i in places:
                key: bytes = self.order[i]
                if key not in self.garbage and usable(self[key]):
                    found.append(key)
                    break
                if not _common_tokens(key, tokens):
                    break
        return found


def _common_tokens(key: bytes, tokens: bytes) -> int:
    length = min(len(key), len(tokens))
    if key.startswith(tokens[:length]):
        return length // TOKEN_BYTES
    differ = int.from_bytes(key[:length], "big") ^ int.from_bytes(tokens[:length], "big")
    return (length - (differ.bit_length() + 7) // 8) // TOKEN_BYTES


NO_CHILDREN = Children()  # of every leaf; nothing is ever added to it
