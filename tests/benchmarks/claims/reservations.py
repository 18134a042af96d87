"""Contiguous memory for whole sequences: the allocators that the baseline reserves from.

They hand out numbers only. A run that is taken overlaps no other, and what is given back joins its
free neighbours at once, so nothing but fragmentation itself is held against the baseline.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Protocol


class Reservations(Protocol):
    """`num_slots` slots. Invariant: `num_taken` is the length of all runs that are out."""

    num_slots: int
    num_taken: int

    def length_for(self, num_slots: int) -> int:
        """What a run of at least `num_slots` really takes."""
        ...

    def take(self, num_slots: int) -> int | None:
        """The start of a free run of at least so many slots; None where there is none now."""
        ...

    def give_back(self, start: int) -> None:
        """End a run that `take` gave out. Raises KeyError when it is not out."""
        ...


class FirstFit:
    """The lowest free run that is long enough, to the slot.

    Invariant: `_free` holds the free runs as (start, end), sorted, none touching another.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_taken = 0
        self._free = [(0, num_slots)]
        self._taken: dict[int, int] = {}  # start: end

    def length_for(self, num_slots: int) -> int:
        return num_slots

    def take(self, num_slots: int) -> int | None:
        for i, (start, end) in enumerate(self._free):
            if end - start >= num_slots:
                cut = start + num_slots
                self._free[i : i + 1] = [(cut, end)] if cut < end else []
                self._taken[start] = cut
                self.num_taken += num_slots
                return start
        return None

    def give_back(self, start: int) -> None:
        end = self._taken.pop(start)
        self.num_taken -= end - start
        i = bisect_left(self._free, (start, end))
        if i < len(self._free) and self._free[i][0] == end:
            end = self._free.pop(i)[1]
        if i and self._free[i - 1][1] == start:
            start = self._free.pop(i - 1)[0]
        insort(self._free, (start, end))


class Buddy:
    """Powers of two at multiples of themselves; two free halves join again (Knowlton, 1965).

    `num_slots` is a power of two. Invariant: `_free[k]` holds the starts of the free runs of
    2**k slots, sorted, never both halves of one.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1 or num_slots & (num_slots - 1):
            raise ValueError(f"num_slots = {num_slots}: a buddy pool is a power of two")
        self.num_slots = num_slots
        self.num_taken = 0
        self._top = num_slots.bit_length() - 1
        self._free: list[list[int]] = [[] for _ in range(self._top)] + [[0]]
        self._taken: dict[int, int] = {}  # start: order

    def length_for(self, num_slots: int) -> int:
        return 1 << _order(num_slots)

    def take(self, num_slots: int) -> int | None:
        wanted = _order(num_slots)
        order = next((k for k in range(wanted, self._top + 1) if self._free[k]), None)
        if order is None:
            return None
        start = self._free[order].pop(0)
        while order > wanted:
            order -= 1
            insort(self._free[order], start + (1 << order))
        self._taken[start] = order
        self.num_taken += 1 << order
        return start

    def give_back(self, start: int) -> None:
        order = self._taken.pop(start)
        self.num_taken -= 1 << order
        while order < self._top and (buddy := start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(buddy)
            start, order = min(start, buddy), order + 1
        insort(self._free[order], start)


def _order(num_slots: int) -> int:
    """Of the smallest power of two that is not below `num_slots`."""
    return (num_slots - 1).bit_length()
