"""The stream of KV events of one pool, and the state that it adds up to. No I/O, no clock.

The cache core tells what became matchable and what no longer is (`stored`, `removed`); that only
queues it, since it happens inside an operation. Hashing and encoding happen in `drain`, once a
turn of the daemon's loop and a bounded number of pages at a time, in the order it was told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np

from kvd.events import wire
from kvd.events.batch import Batch
from kvd.events.hashes import namespace_seed, page_hashes
from kvd.events.page_table import NONE, Origin, PageTable
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES, page_of, refs_from_bytes

PAGES_A_PORTION = 64  # hashed and encoded together: about 0.25 ms
MAX_KEPT_BYTES = 64 << 20  # of batches kept for replay


@dataclass(slots=True)
class Counts:
    """Since the epoch began."""

    batches: int = 0
    pages_stored: int = 0
    pages_removed: int = 0
    pages_dropped: int = 0  # not announced: the page they continue is not known


@dataclass(frozen=True, slots=True)
class _Stored:
    namespace: Namespace
    parent: int | None  # reference
    tokens: bytes
    refs: bytes


@dataclass(frozen=True, slots=True)
class _Removed:
    refs: bytes


class EventLog:
    """An observer of one cache (kvd.radix_tree.Observer), its batches and its page table.

    Invariants: the table is what the batches up to `next_seq` - 1 add up to; `kept` holds the
    batches from `first_kept` to `next_seq` - 1, whole; sequence numbers have no holes. The first
    batch of an epoch begins with AllBlocksCleared.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        epoch: bytes,
        first_seq: int = 0,
        medium: str = "GPU",
        buffer_steps: int = 10_000,
    ) -> None:
        """`epoch`: 16 random bytes, others each time. `first_seq`: greater than any number of an
        epoch before, so that a subscriber sees a restart as a gap."""
        self.page_size = page_size
        self.medium = medium
        self.epoch = epoch
        self.first_seq = self.first_kept = self.next_seq = first_seq
        self.table = PageTable(num_pages, page_size)
        self.counts = Counts()
        self.kept: dict[int, bytes] = {}
        self.wake: Callable[[], None] = lambda: None  # told when there is something to drain
        self._buffer_steps, self._kept_bytes = buffer_steps, 0
        self._page_bytes = page_size * TOKEN_BYTES
        self._origins: WeakValueDictionary[Namespace, Origin] = WeakValueDictionary()
        self._pending: deque[_Stored | _Removed] = deque()
        self._begun = False  # AllBlocksCleared is out
        self._closed = False

    # --- being told; see kvd.radix_tree.Observer

    def stored(self, namespace: Namespace, parent: int | None, tokens: bytes, refs: bytes) -> None:
        for first in range(0, len(refs) // REF_BYTES, PAGES_A_PORTION):
            stop = first + PAGES_A_PORTION
            portion = refs[first * REF_BYTES : stop * REF_BYTES]
            text = tokens[first * self._page_bytes : stop * self._page_bytes]
            self._queue(_Stored(namespace, parent, bytes(text), bytes(portion)))
            parent = int.from_bytes(portion[-REF_BYTES:], "little")

    def removed(self, refs: bytes) -> None:
        """May be told more than once of a page."""
        step = PAGES_A_PORTION * REF_BYTES
        for start in range(0, len(refs), step):
            self._queue(_Removed(bytes(refs[start : start + step])))

    def _queue(self, told: _Stored | _Removed) -> None:
        if self._closed:
            return
        was_dirty = self.dirty
        self._pending.append(told)
        if not was_dirty:
            self.wake()

    # --- the stream

    @property
    def dirty(self) -> bool:
        """`drain` has something to do."""
        return bool(self._pending) or not (self._begun or self._closed)

    @property
    def num_pending(self) -> int:
        """Portions of at most PAGES_A_PORTION pages that wait to be drained."""
        return len(self._pending)

    def drain(self, now: float) -> tuple[int, bytes] | None:
        """The next batch, (sequence number, payload), or None if what was told changes nothing.

        `now`: seconds since 1970, for the consumers. Takes fewer than twice PAGES_A_PORTION pages;
        call again while `dirty`.
        """
        batch = Batch(self.page_size, self.medium)
        if not self._begun:
            self._begun = True
            batch.cleared(self.epoch)
        pages = 0
        while self._pending and pages < PAGES_A_PORTION:
            told = self._pending.popleft()
            pages += len(told.refs) // REF_BYTES
            if isinstance(told, _Stored):
                self._store(told, batch)
            else:
                self._forget(refs_from_bytes(told.refs).tolist(), batch)
        return self._append(batch.encode(now)) if batch else None

    def heartbeat(self, now: float) -> tuple[int, bytes]:
        """An empty batch: a subscriber sees that the publisher lives, and whether it lost any."""
        return self._append(Batch(self.page_size, self.medium).encode(now))

    def close(self) -> None:
        """Nothing is told or drained from now on."""
        self._closed = True
        self._pending.clear()

    def _append(self, payload: bytes) -> tuple[int, bytes]:
        seq = self.next_seq
        self.next_seq += 1
        self.kept[seq] = payload
        self._kept_bytes += len(payload)
        self.counts.batches += 1
        while len(self.kept) > self._buffer_steps or self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self.kept.pop(self.first_kept))
            self.first_kept += 1
        return seq, payload

    def _store(self, told: _Stored, batch: Batch) -> None:
        origin = self._origin(told.namespace)
        parent = NONE
        if told.parent is not None:
            page = page_of(told.parent)
            if self.table.ref[page] != told.parent:
                # Nobody could place them, and nothing continues them that could be placed.
                self.counts.pages_dropped += len(told.refs) // REF_BYTES
                return
            parent = self.table.hash[page]
        refs = refs_from_bytes(told.refs)
        seed = origin.seed if parent == NONE else parent
        hashes = page_hashes(seed, told.tokens, self._page_bytes)
        # What flushed content left behind, of which `removed` tells only later, goes first.
        self._forget(self.table.in_the_way(refs.tolist(), hashes), batch)
        tokens = np.frombuffer(told.tokens, "<i4")
        self.table.add(refs, hashes, parent, origin, tokens.reshape(-1, self.page_size))
        self.counts.pages_stored += len(hashes)
        batch.stored(origin, parent, hashes, tokens.tolist())

    def _forget(self, refs: list[int], batch: Batch) -> None:
        gone = [digest for digest in map(self.table.remove, refs) if digest != NONE]
        self.counts.pages_removed += len(gone)
        batch.removed(gone)

    def _origin(self, namespace: Namespace) -> Origin:
        origin = self._origins.get(namespace)
        if origin is None:
            origin = Origin(
                namespace_seed(namespace), wire.lora_name(namespace), wire.cache_salt(namespace)
            )
            self._origins[namespace] = origin
        return origin
