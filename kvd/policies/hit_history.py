"""What the past says of unused pages: how soon, if ever, they are used again.

Pages are told apart by how often they were used again (their *level*) and by how long they have
been unused (their *band*). Age is counted in pages that were used since, not in seconds: an idle
night makes nothing older, and there is no unit to choose. The last page of a prompt that came once
has a level of its own: what goes on with a prompt often parts from it just there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

LEVELS = (0, 0, 1, 2, 4, 8)  # uses from which on pages are of each level; 0 twice: see LAST_PAGE
LAST_PAGE = 0  # level of a prompt's last page, not used yet
UNUSED = 1  # level of all others that were not
BANDS = 11
FIRST_BAND = 1 / 32  # of the pool; each band is twice as wide as all before it: the last is open
FORGET = 0.9995  # is kept of all counts at each `learn`: half is forgotten in 1386 of them
LIKELIER = 0.5  # exponent of 1 + uses: how much likelier used pages are used again, at first
BELIEF = 0.25  # pages that were unused for long are used this seldom before they are twice as old
DOUBT = 4.0  # pages: so many seen outweigh a belief, or what all levels together say of one


def level_of(uses: int) -> int:
    return bisect_right(LEVELS, uses) - 1


class HitHistory:
    """How many pages reached each level and band, and how many of them were used before the next.

    Invariant: `density` follows from the counts at the last `learn`.
    """

    def __init__(self, num_pages: int) -> None:
        first = num_pages * FIRST_BAND
        self.edges = [0.0, *(first * 2**i for i in range(BANDS - 1))]  # ages where bands begin
        ends = [*self.edges[1:], self.edges[-1] * 2]
        self._widths = [end - edge for edge, end in zip(self.edges, ends, strict=True)]
        self._beliefs = [
            min(0.5, BELIEF * (end - edge) / ((end + edge) / 2))
            for edge, end in zip(self.edges, ends, strict=True)
        ]
        self._reached = [[0.0] * BANDS for _ in LEVELS]
        self._used = [[0.0] * BANDS for _ in LEVELS]
        self.density: list[list[float]] = []  # by level and band: uses per page and clock tick
        self.learn()

    def band_of(self, age: float) -> int:
        return bisect_right(self.edges, age) - 1

    def reached(self, level: int, band: int, num_pages: int) -> None:
        """So many pages have got so old without a use."""
        self._reached[level][band] += num_pages

    def used(self, level: int, age: int, num_pages: int) -> None:
        """So many pages were used again at that age."""
        self._used[level][self.band_of(age)] += num_pages

    def learn(self) -> None:
        """Work the densities out anew, and forget a little."""
        likelier = [(1 + uses) ** LIKELIER for uses in LEVELS]
        at_first = []  # chance of a use within each band at the first level, by what all say
        for band, belief in enumerate(self._beliefs):
            reached = sum(r[band] * x for r, x in zip(self._reached, likelier, strict=True))
            used = sum(counts[band] for counts in self._used)
            at_first.append((used + DOUBT * belief) / (reached + DOUBT))
        self.density = []
        for level, factor in enumerate(likelier):
            counts = zip(at_first, self._used[level], self._reached[level], strict=True)
            chances = [
                min(0.99, (used + DOUBT * min(0.9, chance * factor)) / (reached + DOUBT))
                for chance, used, reached in counts
            ]
            self.density.append(densities(chances, self._widths))
        for row in (*self._reached, *self._used):
            row[:] = [count * FORGET for count in row]


def densities(chances: Sequence[float], widths: Sequence[float]) -> list[float]:
    """For each band: the most uses per time that a page yields which has just reached it, over all
    bands at whose end it could be given up (its Gittins index).

    `chances` of a use within each band, `widths` of the bands. From the last band backwards: a
    band is joined to the stretch behind it while that raises what it yields.
    """
    result: list[float] = []
    stretches: list[tuple[float, float, float]] = []  # uses, time, chance to get through unused
    for chance, width in zip(reversed(chances), reversed(widths), strict=True):
        uses, time, through = chance, width * (1 - chance / 2), 1 - chance
        while stretches and stretches[-1][0] * time > uses * stretches[-1][1]:
            more_uses, more_time, beyond = stretches.pop()
            uses += through * more_uses
            time += through * more_time
            through *= beyond
        stretches.append((uses, time, through))
        result.append(uses / time)
    return result[::-1]
