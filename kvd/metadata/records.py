"""What each page of the tree holds: one fixed-size row a page, from which the tree is rebuilt.

A row, in 64-bit words (native little-endian):

    0 checksum of the others     3 priority's duration, s (NaN: none)    6 reference
    1 id of its root             4 time to live, s (NaN: no wish)        7 parent's reference
    2 published, s               5 publisher | tokens | priority | kind  8... token ids, int32

`published` is CLOCK_MONOTONIC, which goes on over a restart of the daemon within one boot. What
differs between the pages of one publish stands at the end: the checksum adds up the rest once.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from kvd.metadata.checksum import Checksum, Words
from kvd.metadata.failpoints import FAILPOINTS
from kvd.metadata.page_states import IN_TREE, OUTSIDE, UNRECORDED, PageStates
from kvd.retention import Retention
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES

CHECKSUM, ROOT, BORN, DURATION, TTL, INFO, REF, PARENT, TOKENS = range(9)  # first words
NO_PARENT = -1
NO_ROOT = 0  # of a page that is sealed outside the tree
KIND = 0xA5 << 56  # of every row that was ever stored: one of zeros is none
FEW = 2  # so many rows are stored one by one: quicker than an array of them
SCRATCH_ROWS = 512  # are made at a time
NAN = float("nan")
_PAGE = 0xFFFF_FFFF
_PAGES = np.int64(_PAGE)
_REFS, _WORDS = np.dtype("<i8"), np.dtype("<u8")
_PRIORITY = np.uint64(0xFF << 48)


def row_words(page_size: int) -> int:
    return TOKENS + (page_size * TOKEN_BYTES + 7) // 8


class Records:
    """Invariant: the row of a page whose owner is IN_TREE speaks of its current reference."""

    __slots__ = (
        "_bytes",
        "_checksum",
        "_pack",
        "_pack_checksum",
        "_row_bytes",
        "_scratch",
        "_scratch_signed",
        "_scratch_tokens",
        "_scratch_whole",
        "_states",
        "_token_bytes",
        "_token_dtype",
        "_tokens_a_row",
        "_whole",
        "page_size",
        "rows",
    )

    def __init__(self, rows: Words, page_size: int, states: PageStates) -> None:
        """`rows`: one row of `row_words(page_size)` words a page."""
        words = row_words(page_size)
        self.page_size = page_size
        self.rows = rows
        self._states = states
        self._row_bytes = words * 8
        self._token_bytes = page_size * TOKEN_BYTES
        self._checksum = Checksum(words - 1)
        self._pack = struct.Struct(f"<QdddQqq{(words - TOKENS) * 8}s").pack  # all but the checksum
        # Whole rows at once, which is quicker than their words:
        row = f"V{self._row_bytes}"
        self._whole: npt.NDArray[np.void] = rows.view(row).reshape(-1)
        # Where rows are made before they are stored, as words, as numbers and their tokens.
        self._scratch: Words = np.zeros((SCRATCH_ROWS, words), dtype=np.uint64)
        self._scratch_whole: npt.NDArray[np.void] = self._scratch.view(row).reshape(-1)
        self._scratch_signed = self._scratch.view(np.int64)
        unit = 8 if self._token_bytes % 8 == 0 else TOKEN_BYTES
        self._token_dtype = np.dtype(f"<u{unit}")
        first = TOKENS * 8 // unit
        self._tokens_a_row = self._token_bytes // unit
        self._scratch_tokens = self._scratch.view(self._token_dtype)[
            :, first : first + self._tokens_a_row
        ]
        self._pack_checksum = struct.Struct("<Q").pack
        # The same memory, for single rows:
        self._bytes = rows.reshape(-1).view(np.uint8).data

    def published(
        self,
        refs: bytes,
        after: int | None,
        root_id: int,
        tokens: bytes,
        publisher: int,
        now: float,
        retention: Retention,
    ) -> None:
        """The pages are in the tree from now on, one behind the other, the first behind `after`
        (None: at the start of the prompt)."""
        if not root_id:
            if FAILPOINTS.armed:
                FAILPOINTS.hit("publish_unrecorded.before_owner")
            self._states.set_owner(refs, UNRECORDED)
            if FAILPOINTS.armed:
                FAILPOINTS.hit("publish_unrecorded.done")
            return
        duration_s, ttl_s = retention.duration_s, retention.ttl_s
        if duration_s is None:
            duration_s = NAN
        if ttl_s is None:
            ttl_s = NAN
        info = _info(publisher, self.page_size, retention.priority)
        parent = NO_PARENT if after is None else after
        if FAILPOINTS.armed:
            FAILPOINTS.hit("publish.before_row")
        if len(refs) == REF_BYTES:
            ref = int.from_bytes(refs, "little")
            self._store(ref, self._pack(root_id, now, duration_s, ttl_s, info, ref, parent, tokens))
        elif len(refs) <= FEW * REF_BYTES:
            at = 0
            for i in range(0, len(refs), REF_BYTES):
                ref = int.from_bytes(refs[i : i + REF_BYTES], "little")
                page = tokens[at : at + self._token_bytes]
                self._store(
                    ref, self._pack(root_id, now, duration_s, ttl_s, info, ref, parent, page)
                )
                parent = ref
                at += self._token_bytes
        else:
            same = bytes(8) + self._pack(root_id, now, duration_s, ttl_s, info, 0, 0, b"")
            self._store_many(refs, parent, tokens, same)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("publish.before_owner")
        self._states.set_owner(refs, IN_TREE)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("publish.done")

    def sealed_outside(self, ref: int, num_tokens: int) -> None:
        """A page that was a session's own is complete with so many tokens, and no part of the
        tree."""
        if not self._states.recorded:
            return
        info = _info(0, num_tokens, 0)
        body = self._pack(NO_ROOT, 0.0, NAN, NAN, info, ref, NO_PARENT, b"")
        if FAILPOINTS.armed:
            FAILPOINTS.hit("outside.before_row")
        self._store(ref, body)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("outside.before_owner")
        self._states.set_owner(ref.to_bytes(REF_BYTES, "little"), OUTSIDE)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("outside.done")

    def retained(self, refs: bytes | bytearray, retention: Retention) -> None:
        """Another wish holds for these pages of the tree. A row that a crash tears is a miss."""
        if not self._states.recorded:
            return
        pages = np.frombuffer(refs, dtype="<i8") & _PAGE
        pages = pages[self.are_intact(pages)]  # no new checksum for what is damaged, or unrecorded
        rows = self.rows[pages]
        wish = (retention.duration_s, retention.ttl_s)
        rows[:, DURATION : TTL + 1] = np.array(
            [NAN if seconds is None else seconds for seconds in wish], dtype=np.float64
        ).view(np.uint64)
        rows[:, INFO] = rows[:, INFO] & ~_PRIORITY | np.uint64(retention.priority << 48)
        rows[:, CHECKSUM] = self._checksum.of_rows(rows)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("retained.before_row")
        self.rows[pages] = rows
        if FAILPOINTS.armed:
            FAILPOINTS.hit("retained.done")

    # --- reading

    def are_intact(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each page's row is whole and speaks of the page's current reference."""
        rows = self.rows[pages]
        good: npt.NDArray[np.bool_] = rows[:, CHECKSUM] == self._checksum.of_rows(rows)
        good &= rows[:, REF].view(np.int64) == self._states.current[pages]
        good &= (rows[:, INFO] >> np.uint64(56)) == np.uint64(KIND >> 56)
        return good

    # --- how

    def _store(self, ref: int, body: bytes) -> None:
        at = (ref & _PAGE) * self._row_bytes
        checksum = self._pack_checksum(self._checksum.one(body))
        self._bytes[at : at + self._row_bytes] = checksum + body

    def _store_many(self, refs: bytes, parent: int, tokens: bytes, same: bytes) -> None:
        """`same`: a row with what all have in common."""
        count = len(refs) // REF_BYTES
        for first in range(0, count, SCRATCH_ROWS):
            stop = min(first + SCRATCH_ROWS, count)
            at = first * REF_BYTES
            some = np.frombuffer(refs, _REFS, stop - first, at)
            self._store_some(some, parent, tokens, first * self._token_bytes, same)
            parent = int(some[-1])

    def _store_some(
        self, refs: npt.NDArray[np.int64], parent: int, tokens: bytes, at: int, same: bytes
    ) -> None:
        """Few calls of numpy: for a turn of a conversation each takes longer than its work."""
        count = len(refs)
        pages = refs & _PAGES
        words, signed = self._scratch[:count], self._scratch_signed[:count]
        words[:, :REF] = np.frombuffer(same, _WORDS, REF)
        signed[:, REF] = refs
        signed[1:, PARENT] = refs[:-1]
        signed[0, PARENT] = parent
        each = self._tokens_a_row
        ids = np.frombuffer(tokens, self._token_dtype, count * each, at)
        self._scratch_tokens[:count] = ids.reshape(count, each)
        words[:, CHECKSUM] = self._checksum.of_rows(words)
        self._whole[pages] = self._scratch_whole[:count]


def _info(publisher: int, num_tokens: int, priority: int) -> int:
    return (publisher & 0xFFFF_FFFF) | num_tokens << 32 | priority << 48 | KIND
