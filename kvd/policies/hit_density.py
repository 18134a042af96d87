"""Evict what yields least: uses per page and time, as learned from how pages were used before.

The idea is that of hit density (Beckmann, Chen, Cidon: "LHD", NSDI 2018). Ours differs in what
pages are told apart by, in remembering evicted ones, and in queues instead of samples: see
docs/eviction.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvd.policies.age_bands import AgeBands, Run
from kvd.policies.ghosts import Ghost, Ghosts, key_at
from kvd.policies.hit_history import LAST_PAGE, UNUSED, HitHistory, level_of
from kvd.policies.policy import Policy

if TYPE_CHECKING:
    from kvd.node import Node

LEARN_EVERY = 16, 256  # nodes added, at first and later: it takes about 0.1 ms


class Rank:
    """What the policy knows of a node.

    Its pages before the prompt's page `known_end` were used `base` times more than `node.hits`
    says: in an earlier life, from which a ghost was left. `lost_end`: so far did it reach before
    its last pages went. `behind`: key of the run behind `known_end`, if it has one or had.
    `runs`: one to three, in order: what is known from before, what is not, and the last page if
    the prompt has come once; empty while the node is protected.
    """

    __slots__ = ("base", "behind", "known_end", "last_use_s", "lost_end", "runs", "start")

    def __init__(self, start: int, base: int = 0, known_end: int = 0) -> None:
        self.start = start  # the node's depth at first; less than now if it was cut since
        self.base = base
        self.known_end = known_end
        self.lost_end = 0
        self.behind: int | None = None
        self.last_use_s = 0.0  # the node's, when `runs` was made
        self.runs: tuple[Run, ...] = ()


class HitDensity(Policy):
    """Invariants: the runs of the nodes in order and of the ghosts are in `_bands`, of the nodes
    the last one exposed; `_clock` counts the pages that were used so far."""

    def __init__(self, num_pages: int, cost_of: Callable[[Node], int] = lambda node: 0) -> None:
        """`cost_of`: what computing a node's pages anew costs, in half powers of two."""
        self._history = HitHistory(num_pages)
        self._bands = AgeBands(self._history)
        self._ghosts = Ghosts(num_pages, self._bands)
        self._cost_of = cost_of
        self._clock = 0
        self._num_nodes = 0
        self._learn_every, self._learn_seldom = LEARN_EVERY
        self._until_learning = self._learn_every

    def __len__(self) -> int:
        return self._num_nodes

    def __iter__(self) -> Iterator[Node]:
        return iter(self._bands)

    def add(self, node: Node) -> None:
        rank: Rank | None = node.rank
        if rank is None:
            rank = node.rank = self._first_rank(node)
        if not rank.runs or rank.last_use_s != node.last_use_s:
            self._note_use(rank.runs)  # it was used while it stood aside
            self._begin(node, rank)
        for run in rank.runs:
            self._bands.enter(run, self._clock)
        self._bands.expose(rank.runs[-1], node)
        self._bands.grow_older(self._clock)
        self._num_nodes += 1

    def discard(self, node: Node) -> None:
        rank: Rank = node.rank
        for run in rank.runs:
            self._bands.leave(run)
        if node.protected:
            self._note_use(rank.runs)
            rank.runs = ()
        self._num_nodes -= 1

    def victim(self) -> Node:
        return self._bands.first()

    def portion(self, node: Node) -> int:
        rank: Rank = node.rank
        return min(node.num_pages, node.end - rank.runs[-1].start)

    def evicted(self, node: Node, num_pages: int) -> None:
        rank: Rank = node.rank
        if not node.id:
            self._remember(node, rank)
            return
        rank.lost_end = max(rank.lost_end, node.end + num_pages)
        while len(rank.runs) > 1 and node.end <= rank.runs[-1].start:
            *others, last = rank.runs
            rank.runs = tuple(others)
            if last.level == LAST_PAGE:
                self._bands.leave(last)
                rank.lost_end = last.start  # as if it had never been
            else:
                self._bands.hide(last)
                assert rank.behind is not None
                self._ghosts.keep(rank.behind, Ghost(node.hits, rank.lost_end, (last,), None))
            self._bands.expose(others[-1], node)

    def alike(self, parent: Node, child: Node) -> bool:
        """Joined, both would count as used as often as the parent's end."""
        return level_of(_uses(parent, parent.end - 1)) == level_of(_uses(child, child.depth))

    def _begin(self, node: Node, rank: Rank) -> None:
        """It has just been used, and its pages begin to be unused anew."""
        self._clock += node.num_pages
        self._until_learning -= 1
        if not self._until_learning:
            self._learn_every = min(self._learn_seldom, self._learn_every * 5 // 4)
            self._until_learning = self._learn_every
            self._history.learn()
            self._bands.rank_anew()
        rank.last_use_s = node.last_use_s
        rank.runs = self._new_runs(node, rank)
        for run in rank.runs:
            self._history.reached(run.level, 0, run.num_pages)

    def _new_runs(self, node: Node, rank: Rank) -> tuple[Run, ...]:
        now, cost, runs = self._clock, self._cost_of(node), []
        start, end, level = node.depth, node.end, level_of(_uses(node, node.depth))
        if rank.base and start < rank.known_end < end:
            runs.append(Run(level, cost, start, rank.known_end - start, now))
            start, level = rank.known_end, level_of(node.hits)
            rank.behind = key_at(node, start)
        if level == UNUSED and start < end - 1 and not node.children:
            runs.append(Run(level, cost, start, end - 1 - start, now))
            start, level = end - 1, LAST_PAGE
        runs.append(Run(level, cost, start, end - start, now))
        return tuple(runs)

    def _remember(self, node: Node, rank: Rank) -> None:
        """Leave a ghost of a node that is gone, but not of a last page."""
        runs = [run for run in rank.runs if run.num_pages and run.level != LAST_PAGE]
        if not runs:
            return
        for run in runs:
            self._bands.enter(run, self._clock)
        last = rank.runs[-1]
        end = last.start if last.level == LAST_PAGE else max(node.end, rank.lost_end)
        ghost = Ghost(_uses(node, node.depth), end, runs, rank.behind)
        self._ghosts.keep(key_at(node, node.depth), ghost)

    def _first_rank(self, node: Node) -> Rank:
        if node.hits:
            return self._rank_of_cut(node)
        ghost = self._ghosts.take(key_at(node, node.depth))
        if ghost is not None:
            self._note_use(ghost.runs)
            behind = self._ghosts.take(ghost.behind)
            if behind is not None:
                self._note_use(behind.runs)
            return Rank(node.depth, ghost.uses + 1, ghost.end)
        parent = node.parent
        above: Rank | None = parent.rank if parent is not None else None
        if parent is None or above is None or above.lost_end <= node.depth:
            return Rank(node.depth)
        end, above.lost_end = above.lost_end, 0  # what it lost is back, as far as anyone knows
        return Rank(node.depth, _uses(parent, parent.depth), end)

    def _rank_of_cut(self, node: Node) -> Rank:
        """Of the upper part of a node that a match has cut: the lower one has kept the rank."""
        for child in node.children.values():
            rank: Rank | None = child.rank
            if rank is not None and rank.start <= node.depth:
                self._note_cut(rank.runs, node.end)
                return Rank(node.depth, rank.base, rank.known_end)
        return Rank(node.depth)

    def _note_cut(self, runs: Sequence[Run], depth: int) -> None:
        """Of a node's runs, what is before that page of the prompt was used."""
        for run in runs:
            pages = min(run.num_pages, depth - run.start)
            if pages > 0:
                self._history.used(run.level, self._clock - run.since, pages)
                run.start += pages
                run.num_pages -= pages

    def _note_use(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self._history.used(run.level, self._clock - run.since, run.num_pages)


def _uses(node: Node, depth: int) -> int:
    """How often the node's page at that place of the prompt was used again."""
    rank: Rank | None = node.rank
    return node.hits + rank.base if rank is not None and depth < rank.known_end else node.hits
