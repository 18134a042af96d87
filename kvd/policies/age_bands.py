"""Runs of pages in queues by what is known of them, and the queue whose turn it is."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvd.policies.hit_history import BANDS, HitHistory

if TYPE_CHECKING:
    from kvd.node import Node

MOVES_A_CALL = 64  # runs that get into their next band: no call takes long, and none stays behind
LOOKS_A_BAND = 16  # so often are ages looked at within the time that a band is wide
Key = tuple[int, int, int]  # level, cost, band


class Run:
    """Pages that follow each other in one node and were used equally often; or were in one."""

    __slots__ = ("band", "cost", "level", "num_pages", "since", "start")

    def __init__(self, level: int, cost: int, start: int, num_pages: int, since: int) -> None:
        self.level = level  # how often they were used (hit_history.LEVELS)
        self.cost = cost  # how dear they are, in half powers of two
        self.start = start  # pages of the prompt before them
        self.num_pages = num_pages  # as far as the history is concerned; some may have gone
        self.since = since  # the clock when they were last used
        self.band = 0  # how long ago that is (hit_history), as far as `grow_older` has got


class AgeBands:
    """Runs by age: those of the tree, and the ghosts of some that have left it.

    Invariants: a run is in `_by_age[run.band]`; it is also in the queue of its level, cost and
    band if its pages can be the next victims, with their node; each queue that is not empty is in
    `_heap`, with the density of its level and band times its cost. Runs stand in the order in
    which they got there, the longest unused first; but one that came back or became a ghost stands
    behind younger ones of its band, and gets into the next with them.
    """

    def __init__(self, history: HitHistory) -> None:
        self._history = history
        self._by_age: list[OrderedDict[Run, None]] = [OrderedDict() for _ in range(BANDS)]
        self._queues: dict[Key, OrderedDict[Run, Node]] = {}
        self._heap: list[tuple[float, int, int, int]] = []  # density, -band, level, cost
        self._next_look = 0.0  # on the clock
        self._num_looks = 0

    def enter(self, run: Run, now: int) -> None:
        """A run that was last used at `run.since`; its pages cannot be victims yet."""
        run.band = self._history.band_of(now - run.since) if now > run.since else 0
        self._by_age[run.band][run] = None

    def leave(self, run: Run) -> None:
        del self._by_age[run.band][run]
        self.hide(run)

    def expose(self, run: Run, node: Node) -> None:
        """The run is the last one of a node whose turn may come."""
        key = (run.level, run.cost, run.band)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = OrderedDict()
        if not queue:
            heapq.heappush(self._heap, self._entry(key))
        queue[run] = node

    def hide(self, run: Run) -> None:
        """Undoes `expose`."""
        queue = self._queues.get((run.level, run.cost, run.band))
        if queue is not None:
            queue.pop(run, None)

    def first(self) -> Node:
        """The node whose last run is worth least; among equals the longest unused."""
        while True:
            _, minus_band, level, cost = self._heap[0]
            queue = self._queues[level, cost, -minus_band]
            if queue:
                return next(iter(queue.values()))
            heapq.heappop(self._heap)  # it is pushed again when something enters the queue

    def __iter__(self) -> Iterator[Node]:
        """The nodes in the order in which their turns would come now."""
        for entry in sorted(self._entry(key) for key, queue in self._queues.items() if queue):
            _, minus_band, level, cost = entry
            yield from self._queues[level, cost, -minus_band].values()

    def grow_older(self, now: int) -> None:
        """Let runs get into the bands that their ages have reached, a bounded number of them."""
        if now < self._next_look:
            return
        moves, queues, edges = MOVES_A_CALL, self._queues, self._history.edges
        for band in range(BANDS - 2, -1, -1):
            if self._num_looks & ((1 << band // 2) - 1):
                continue  # the wide ones are looked at less often
            runs, older, latest = self._by_age[band], self._by_age[band + 1], now - edges[band + 1]
            due: list[Run] = []
            for run in runs:
                if run.since > latest:
                    break
                if len(due) == moves:
                    moves = -1  # the next call goes on
                    break
                due.append(run)
            for run in due:
                del runs[run]
                older[run] = None
                queue = queues.get((run.level, run.cost, band))
                run.band = band + 1
                self._history.reached(run.level, band + 1, run.num_pages)
                node = queue.pop(run, None) if queue else None
                if node is not None:
                    self.expose(run, node)
            if moves < 0:
                return
            moves -= len(due)
        self._num_looks += 1
        self._next_look = now + edges[1] / LOOKS_A_BAND

    def rank_anew(self) -> None:
        """The history has learned: the queues' densities are others now."""
        self._queues = {key: queue for key, queue in self._queues.items() if queue}
        self._heap = [self._entry(key) for key in self._queues]
        heapq.heapify(self._heap)

    def _entry(self, key: Key) -> tuple[float, int, int, int]:
        level, cost, band = key
        return self._history.density[level][band] * 2 ** (cost / 2), -band, level, cost
