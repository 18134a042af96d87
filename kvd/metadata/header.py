"""The first page of the metadata: what pool this is, and the few counters that outlive a start.

Counters carry 16 bits of check in their word, so that each is one store and yet no stray write
passes for a count.
"""

from __future__ import annotations

import struct

from kvd.metadata.checksum import Checksum
from kvd.metadata.cold import ColdStart
from kvd.metadata.failpoints import FAILPOINTS
from kvd.metadata.geometry import Geometry, places

MAGIC = b"kvd meta"
VERSION = 1  # of everything in this memory, the constants of the checksums included
MAX_FAILED_WARM_STARTS = 3
_FIXED = struct.Struct("<8sQQQQQQQ16s32s32s")  # a whole number of words
_CHECKSUM_AT = _FIXED.size
_EPOCH, _NEXT_SESSION, _FAILED = 64, 72, 80  # words: each group in a cache line of its own
_COUNT_BITS = 48
_COUNT_MASK = (1 << _COUNT_BITS) - 1


class Header:
    """Invariant: the fixed part never changes once the magic is there."""

    def __init__(self, memory: memoryview) -> None:
        """`memory`: the first HEADER_BYTES, as bytes."""
        self._bytes = memory
        self._words = memory.cast("Q")

    # --- the fixed part

    def write(self, geometry: Geometry, pool_id: str) -> None:
        """For new memory. The magic comes last: without it there is no metadata."""
        body = _fixed(geometry, pool_id)
        self._set(_EPOCH, 1)
        self._set(_NEXT_SESSION, 1)
        self._set(_FAILED, 0)
        self._bytes[8:_CHECKSUM_AT] = body[8:]
        self._words[_CHECKSUM_AT // 8] = Checksum(len(body) // 8).one(body)
        self._bytes[:8] = MAGIC

    def check(self, geometry: Geometry) -> None:
        """Raises ColdStart, naming what differs."""
        body = bytes(self._bytes[:_CHECKSUM_AT])
        if body[:8] != MAGIC:
            raise ColdStart("no_metadata", f"the memory begins with {body[:8]!r}: not {MAGIC!r}")
        if self._words[1] != VERSION:
            raise ColdStart(
                "format", f"metadata of format {self._words[1]}; this is written as {VERSION}"
            )
        if self._words[_CHECKSUM_AT // 8] != Checksum(len(body) // 8).one(body):
            raise ColdStart("header", "the header's checksum does not fit")
        here, wanted = _FIXED.unpack(body), _FIXED.unpack(_fixed(geometry, self.pool_id))
        for name, old, new in zip(_NAMES, here, wanted, strict=True):
            if old != new:
                raise ColdStart("geometry", f"the pool's {name} was {old!r} and is {new!r} now")
        for counter in (_EPOCH, _NEXT_SESSION, _FAILED):
            self._get(counter)

    @property
    def pool_id(self) -> str:
        """16 hexadecimal digits."""
        return bytes(self._bytes[64:80]).decode("ascii", "replace")

    # --- counters

    @property
    def epoch(self) -> int:
        return self._get(_EPOCH)

    @property
    def next_session_id(self) -> int:
        return self._get(_NEXT_SESSION)

    @next_session_id.setter
    def next_session_id(self, value: int) -> None:
        """It never falls."""
        if value > self.next_session_id:
            self._set(_NEXT_SESSION, value)

    @property
    def failed_warm_starts(self) -> int:
        return self._get(_FAILED)

    def warm_start_begins(self) -> None:
        """Counted before it is tried: whoever dies of it has been counted. Raises ColdStart after
        MAX_FAILED_WARM_STARTS in a row."""
        failed = self.failed_warm_starts
        if failed >= MAX_FAILED_WARM_STARTS:
            raise ColdStart("failed_warm_starts", f"{failed} warm starts in a row did not succeed")
        if FAILPOINTS.armed:
            FAILPOINTS.hit("start.before_failed")
        self._set(_FAILED, failed + 1)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("start.before_epoch")
        self._set(_EPOCH, self.epoch + 1)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("start.done")

    def warm_start_done(self) -> None:
        """The daemon serves."""
        if FAILPOINTS.armed:
            FAILPOINTS.hit("ready.before_failed")
        self._set(_FAILED, 0)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("ready.done")

    # --- how

    def _get(self, word: int) -> int:
        raw = self._words[word]
        value = raw & _COUNT_MASK
        if raw != _guarded(value):
            raise ColdStart("header", f"counter {word} of the header is {raw:#x}: not a count")
        return value

    def _set(self, word: int, value: int) -> None:
        self._words[word] = _guarded(value)


_NAMES = (
    "magic",
    "format",
    "number of pages",
    "page size",
    "page bytes",
    "number of roots",
    "number of sessions",
    "number of weights versions",
    "id",
    "layout digest",
    "model digest",
)


def _fixed(geometry: Geometry, pool_id: str) -> bytes:
    return _FIXED.pack(
        MAGIC,
        VERSION,
        geometry.num_pages,
        geometry.page_size,
        geometry.page_bytes,
        places(geometry).num_roots,
        geometry.num_sessions,
        geometry.num_weights,
        pool_id.encode("ascii"),
        geometry.layout_digest,
        geometry.model_digest,
    )


def _guarded(value: int) -> int:
    check = ((value + 1) * 0x9E37_79B9_7F4A_7C15 >> 40) & 0xFFFF
    return value | check << _COUNT_BITS
