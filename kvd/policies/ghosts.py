"""A bounded memory of what was evicted, so that it is known again when it comes back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvd.policies.age_bands import AgeBands, Run

if TYPE_CHECKING:
    from kvd.node import Node

LEAST = 4096  # ghosts, of small pools too: a few hundred bytes each
PAGES_A_GHOST = 16  # of larger pools


class Ghost:
    """Pages that left one node, from the one that its key names up to the prompt's page `end`."""

    __slots__ = ("behind", "end", "runs", "uses")

    def __init__(self, uses: int, end: int, runs: Sequence[Run], behind: int | None) -> None:
        self.uses = uses  # of its first page
        self.end = end
        self.runs = runs
        self.behind = behind  # key of the ghost of what followed it in its node and left before


class Ghosts:
    """The ghosts that left last, by key: at most one for PAGES_A_GHOST pages of the pool, or LEAST.

    Invariant: the runs of exactly these ghosts are in `bands`, where they go on growing older.
    """

    def __init__(self, num_pages: int, bands: AgeBands) -> None:
        self._bands = bands
        self._most = max(LEAST, num_pages // PAGES_A_GHOST)
        self._ghosts: OrderedDict[int, Ghost] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ghosts)

    def keep(self, key: int, ghost: Ghost) -> None:
        """Remember a ghost whose runs are in the bands; forget the oldest if there are too many."""
        self.take(key)
        self._ghosts[key] = ghost
        if len(self._ghosts) > self._most:
            self.take(next(iter(self._ghosts)))

    def take(self, key: int | None) -> Ghost | None:
        """The ghost of that key, which is forgotten; None if there is none."""
        ghost = None if key is None else self._ghosts.pop(key, None)
        if ghost is not None:
            for run in ghost.runs:
                self._bands.leave(run)
        return ghost


def key_at(node: Node, depth: int) -> int:
    """Equal for the same tokens at the same place of the same namespace's prompts. What else is
    equal is a mistake about the past of some pages, and no more."""
    step = len(node.tokens) // node.num_pages
    first = (depth - node.depth) * step
    return hash((node.root.namespace, depth, bytes(node.tokens[first : first + step])))
