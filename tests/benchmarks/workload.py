"""Caches filled with documents, and prompts that meet them in known ways."""

from __future__ import annotations

import gc

import numpy as np

from kvd.cache import CacheManager
from kvd.metadata import Metadata
from kvd.results import Match
from kvd.server import settle_collector
from kvd.session import Session
from kvd_shared.layout import pages_needed
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES

PAGE_SIZE = 16  # tokens
PAGE_TOKEN_BYTES = PAGE_SIZE * TOKEN_BYTES
NAMESPACE = Namespace(model="benchmark")
VOCABULARY = 32_000
DOCUMENT_PAGES = 64  # of the documents that a pool is filled with
GARDEN_SEED = 1


class Tokens:
    """Seeded random token ids, so that two documents practically never begin alike."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def take(self, count: int) -> bytes:
        """`count` token ids as int32."""
        return self._random.integers(0, VOCABULARY, count, dtype=np.int32).tobytes()

    def pages(self, count: int) -> bytes:
        return self.take(count * PAGE_SIZE)


def copied(raw: bytes) -> bytes:
    """Equal bytes in a buffer of their own, as they arrive with a message."""
    return bytes(bytearray(raw))


class Garden:
    """A cache core, one session on it, and a clock that goes on with each operation.

    `head` are the tokens that every document begins with, so that they branch below it.
    `recorded`: what the pages hold is recorded for a restart, as where the memory is kept.
    """

    def __init__(
        self,
        num_pages: int,
        head: bytes = b"",
        seed: int = GARDEN_SEED,
        *,
        recorded: bool = False,
    ) -> None:
        meta = Metadata.in_memory(num_pages, PAGE_SIZE, recorded=recorded)
        self.cache = CacheManager(num_pages, PAGE_SIZE, meta=meta)
        self.session: Session = self.cache.open_session(1, "benchmark", 0.0)
        self.head = head
        self.tokens = Tokens(seed)
        self._now = 0.0

    @property
    def now(self) -> float:
        self._now += 1e-3
        return self._now

    def store(self, tokens: bytes) -> None:
        """A prompt of whole pages computed, published and let go."""
        refs = self.publish(tokens, self.acquire(tokens))
        self.free(refs)

    def plant(self, num_documents: int, pages_each: int) -> None:
        """Store that many documents below the head."""
        for _ in range(num_documents):
            self.store(self.head + self.tokens.pages(pages_each))

    def make_room(self, num_pages: int) -> None:
        """See to it that so many pages are free: documents unused for longest go."""
        short = num_pages - len(self.cache.free_list)
        if short > 0:
            self.evict(short)

    def evict(self, num_pages: int) -> None:
        """The least recently used pages leave the tree and are free."""
        self.cache.free_list.put(self.cache.tree.evict(num_pages, self.now))

    # --- the operations, each one call of the core

    def match(self, tokens: bytes, min_partial: int | None = None) -> Match:
        return self.cache.match(self.session, NAMESPACE, tokens, self.now, min_partial)

    def let_go(self, found: Match) -> None:
        if found.partial_ref is not None:
            self.free(found.partial_ref.to_bytes(REF_BYTES, "little"))
        if found.refs:
            self.free(found.refs)

    def acquire(self, tokens: bytes) -> bytes:
        """Pages for all the tokens: what is cached held, the rest allocated."""
        count = pages_needed(len(tokens), PAGE_TOKEN_BYTES)
        return self.cache.acquire(self.session, NAMESPACE, tokens, count, None, self.now).refs

    def allocate(self, count: int) -> bytes:
        return self.cache.allocate(self.session, count, None, self.now)

    def publish(self, tokens: bytes, refs: bytes) -> bytes:
        return self.cache.publish(self.session, NAMESPACE, tokens, refs, None, self.now).refs

    def free(self, refs: bytes) -> None:
        self.cache.free(self.session, refs, self.now)


def filled(num_pages: int, room: int, document_pages: int = DOCUMENT_PAGES) -> Garden:
    """A pool full of cached documents but for `room` pages."""
    garden = Garden(num_pages)
    garden.plant((num_pages - room) // document_pages, document_pages)
    return garden


def settle() -> None:
    """Let the collector do as in the daemon."""
    gc.collect()  # what the benchmark itself has left
    settle_collector()
