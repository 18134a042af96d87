"""What operations of role worker return to a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvd_shared.refs import PageRefs


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Pages that the session now holds.

    `refs` are int64[matched pages + allocated pages]; the first `num_matched_pages` hold the
    `matched_tokens` first tokens of the prompt and are never to be written. `partial_ref`, if
    asked for and found, is held besides: its first `partial_tokens` continue the prompt; copy them
    into a page of your own, then free it. With `stop` "pending" nothing is held: the request waits
    (see `acquire`).
    """

    refs: PageRefs
    num_matched_pages: int
    matched_tokens: int
    stop: str  # "limit", "not_cached", "stale_version" or "pending"
    partial_ref: int | None = None
    partial_tokens: int = 0
    pending_tokens: int = 0  # what another request computes will make so many tokens cached
    pending_s: float | None = None  # in about so many seconds


@dataclass(frozen=True, slots=True)
class PublishResult:
    """`refs` are the canonical pages, int64[pages published]. Where they differ from what was
    sent, they are held in addition: swap the block table, then free the page that was sent."""

    refs: PageRefs
    num_new: int
    num_duplicates: int


@dataclass(frozen=True, slots=True)
class Retention:
    """A wish for pages in the cache. `priority` 0..100 (of two evictable pages the lower goes
    first; 35 is everyone's), for `duration_s` from when they are first unheld (None: for good);
    not matchable `ttl_s` after their last use (None: as configured)."""

    priority: int = 35
    duration_s: float | None = None
    ttl_s: float | None = None

    def to_wire(self) -> dict[str, Any]:
        return {"priority": self.priority, "duration_s": self.duration_s, "ttl_s": self.ttl_s}


@dataclass(frozen=True, slots=True)
class ExtendResult:
    """One entry a row of `extend`. Of `refs`, row i's new pages are the next `num_new[i]`. Swaps:
    in row `swap_rows[j]`, the block table's entry `swap_places[j]` has to become `swap_refs[j]`
    before the next step."""

    status: list[str]  # "OK", or an error's code
    num_new: npt.NDArray[np.int32]
    refs: PageRefs
    swap_rows: npt.NDArray[np.int32]
    swap_places: npt.NDArray[np.int32]
    swap_refs: PageRefs


@dataclass(frozen=True, slots=True)
class ForkResult:
    """`sequences` are the new handles. `refs` are int64[forks, own pages]: what stands in their
    block tables behind the full pages that they share. `copy_from`: copy that page into the first
    of each row; None if there is nothing to copy."""

    sequences: list[int]
    refs: PageRefs
    copy_from: int | None
