"""What the cache core's operations return, and what it counts."""

from __future__ import annotations


class Match:
    """Held pages in order: the longest cached prefix, then (from `acquire`) new pages."""

    __slots__ = (
        "matched_tokens",
        "num_matched_pages",
        "partial_ref",
        "partial_tokens",
        "pending_s",
        "pending_tokens",
        "refs",
        "stop",
    )

    def __init__(self, refs: bytes, num_matched_pages: int, matched_tokens: int, stop: str) -> None:
        self.refs = refs
        self.num_matched_pages = num_matched_pages
        self.matched_tokens = matched_tokens  # in those pages
        self.stop = stop  # see STOPS
        # A page of which the first `partial_tokens` continue the prefix, held once more until it
        # is freed: to be copied into a page of one's own.
        self.partial_ref: int | None = None
        self.partial_tokens = 0
        self.pending_tokens = 0  # how far another request's computing will make the prompt cached
        # in about so many seconds; None: unknown, or nothing pending
        self.pending_s: float | None = None


STOPS = {
    "limit": "all that may match did",
    "not_cached": "the tree ends or differs there",
    "stale_version": "the namespace's weights version is too old",
    "pending": "nothing is held: the request waits until another has computed more of it",
}


class Published:
    """`refs` are the canonical pages of the published tokens, all held. Where they differ from the
    caller's, the caller swaps its block tables and then frees its own duplicate."""

    __slots__ = ("num_duplicates", "num_new", "refs")

    def __init__(self, refs: bytes, num_new: int, num_duplicates: int) -> None:
        self.refs = refs
        self.num_new = num_new
        self.num_duplicates = num_duplicates


class Counters:
    """Totals since the start. Tokens are the prompts'; pages that left are in Departures."""

    def __init__(self) -> None:
        self.tokens_asked = 0
        self.tokens_matched = 0  # in whole pages; of these ...
        self.tokens_matched_own = 0  # ... in pages that the asking session published itself
        self.tokens_partial = 0  # besides, in pages to be copied
        self.published_pages = 0
        self.duplicate_pages = 0
        self.copied_pages = 0  # by fork and make_writable
        self.allocated_pages = 0
