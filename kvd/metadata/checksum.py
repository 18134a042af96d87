"""A checksum of rows of 64-bit words that is quick for one row and, with numpy, for thousands.

Multilinear: word i, its upper half folded into the lower one, times an odd constant of its own;
the sum modulo 2**64. Without the fold, flips of the uppermost bits of two words could cancel each
other. It recognises torn and stray writes; it is no defence against somebody who forges a row.
"""

from __future__ import annotations

import struct
from operator import mul

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
MASK = (1 << 64) - 1
_SEED = 0x6B76_6420_6D65_7461  # of the constants, for ever: format VERSION names them too
_START = 0x9E6D_27A4_51C3_8F0B  # so that a row of zeros does not have checksum zero
_START_NP = np.uint64(_START)
_HALF = np.uint64(32)


def _constants(count: int) -> tuple[int, ...]:
    """The first `count` odd constants (splitmix64)."""
    found, state = [], _SEED
    for _ in range(count):
        state = (state + 0x9E37_79B9_7F4A_7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & MASK
        found.append((z ^ (z >> 31)) | 1)
    return tuple(found)


class Checksum:
    """Of rows of exactly `num_words` words."""

    __slots__ = ("_constants", "_constants_np", "_lower", "_num_bytes", "_unpack")

    def __init__(self, num_words: int) -> None:
        self._constants = _constants(num_words)
        self._constants_np: Words = np.array((0, *self._constants), dtype=np.uint64)
        self._num_bytes = num_words * 8
        self._lower = int.from_bytes(b"\xff\xff\xff\xff\0\0\0\0" * num_words, "little")
        self._unpack = struct.Struct(f"<{num_words}Q").unpack

    def one(self, row: bytes) -> int:
        whole = int.from_bytes(row, "little")
        whole ^= (whole >> 32) & self._lower
        words = self._unpack(whole.to_bytes(self._num_bytes, "little"))
        return (_START + sum(map(mul, words, self._constants))) & MASK

    def of_rows(self, rows: Words) -> Words:
        """`one` of each row of a two-dimensional array, without the row's first word, in which the
        checksum stands."""
        folded = rows >> _HALF
        folded ^= rows
        sums: Words = np.dot(folded, self._constants_np)
        sums += _START_NP
        return sums
