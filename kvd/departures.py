"""Why pages left the tree: totals, how long they lived, and a bounded memory of the latest."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from kvd_shared.namespace import Namespace

REMEMBERED = 8192  # runs of pages; about 3 MB
REASONS = ("evicted", "over_share", "expired", "flushed", "stale_version")
# Upper bounds in seconds, powers of two from 1/64 s to 3 days; one more bucket is for the rest.
BUCKETS_S = tuple(2.0**e for e in range(-6, 19))
LAST_BUCKET = len(BUCKETS_S)

# Where a run of pages began: behind which page (None: at the start of which namespace's prompts),
# and the token ids of its first page. A page's reference is never used twice, so this is exact.
Place = tuple[int | Namespace, bytes]


class Departure(NamedTuple):
    """One run of pages that left together. Times are the daemon's clock."""

    when_s: float
    reason: str  # of REASONS
    num_pages: int
    last_use_s: float


class Histogram:
    """Pages by seconds, in fixed buckets."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float, pages: int) -> None:
        # its whole 64ths have one binary digit more for each bound that it reaches
        bucket = int(seconds * 64).bit_length()
        self.counts[bucket if bucket < LAST_BUCKET else LAST_BUCKET] += pages
        self.sum_s += seconds * pages

    def to_wire(self) -> dict[str, Any]:
        return {"bounds": BUCKETS_S, "counts": self.counts, "sum": self.sum_s}


class Departures:
    """Invariant: `pages` sums to the pages that have ever left.

    The latest are kept as they come: every eviction notes one, and hardly anybody asks.
    """

    def __init__(self) -> None:
        self.pages = dict.fromkeys(REASONS, 0)
        self.lifetime = Histogram()  # from publication to departure
        self.idle = Histogram()  # from the end of the last hold to departure
        # (place, when, reason, pages, last use); as Any they are looked through without unpacking
        self._latest: deque[Any] = deque(maxlen=REMEMBERED)

    def note(
        self,
        place: Place,
        reason: str,
        num_pages: int,
        born_s: float,
        last_use_s: float,
        now: float,
    ) -> None:
        self.pages[reason] += num_pages
        self.lifetime.add(now - born_s, num_pages)
        self.idle.add(now - last_use_s, num_pages)
        self._latest.append((place, now, reason, num_pages, last_use_s))

    def at(self, place: Place) -> Departure | None:
        """What was there and left, if that is still remembered."""
        wanted: Any = place
        for entry in reversed(self._latest):
            if entry[0] == wanted:
                return Departure(*entry[1:])
        return None
