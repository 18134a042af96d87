"""What the cache core's operations return, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """Held pages in order: the longest cached prefix, then (from `acquire`) new pages."""

    refs: bytes
    num_matched_pages: int
    matched_tokens: int
    stop: str  # "limit": all that may match did; "not_cached": the tree ends or differs there


@dataclass(frozen=True, slots=True)
class Published:
    """`refs` are the canonical pages of the published tokens, all held. Where they differ from the
    caller's, the caller swaps its block tables and then frees its own duplicate."""

    refs: bytes
    num_new: int
    num_duplicates: int


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    tokens_asked: int = 0
    tokens_matched: int = 0
    evicted_pages: int = 0
    published_pages: int = 0
    duplicate_pages: int = 0
