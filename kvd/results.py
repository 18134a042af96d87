"""What the cache core's operations return, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Match:
    """Held pages in order: the longest cached prefix, then (from `acquire`) new pages."""

    refs: bytes
    num_matched_pages: int
    matched_tokens: int  # in those pages
    stop: str  # see STOPS
    # A page of which the first `partial_tokens` continue the prefix, held once more until it is
    # freed: to be copied into a page of one's own.
    partial_ref: int | None = None
    partial_tokens: int = 0
    pending_tokens: int = 0  # how far another request's computing will make the prompt cached
    pending_s: float | None = None  # in about so many seconds; None: unknown, or nothing pending


STOPS = {
    "limit": "all that may match did",
    "not_cached": "the tree ends or differs there",
    "stale_version": "the namespace's weights version is too old",
    "pending": "nothing is held: the request waits until another has computed more of it",
}


@dataclass(slots=True)
class Published:
    """`refs` are the canonical pages of the published tokens, all held. Where they differ from the
    caller's, the caller swaps its block tables and then frees its own duplicate."""

    refs: bytes
    num_new: int
    num_duplicates: int


@dataclass(slots=True)
class Counters:
    """Totals since the start. Tokens are the prompts'; pages that left are in Departures."""

    tokens_asked: int = 0
    tokens_matched: int = 0  # in whole pages; of these ...
    tokens_matched_own: int = 0  # ... in pages that the asking session published itself
    tokens_partial: int = 0  # besides, in pages to be copied
    published_pages: int = 0
    duplicate_pages: int = 0
    copied_pages: int = 0  # by fork and make_writable
    allocated_pages: int = 0
