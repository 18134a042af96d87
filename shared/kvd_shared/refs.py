"""Page references: (page, generation) in one int64, `generation << 32 | page`, little-endian.

A reference outlives its page's use only as a number: the generation is raised each time a page
becomes free, so a reference to an earlier use never equals a current one. Arrays of references
travel as raw bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PageRefs = npt.NDArray[np.int64]
TokenIds = npt.NDArray[np.int32]

REF_BYTES = 8
TOKEN_BYTES = 4
MAX_REF = (1 << 63) - 1
GENERATION = 1 << 32  # adding it to a reference gives the same page's next generation


def page_of(ref: int) -> int:
    return ref & 0xFFFF_FFFF


def generation_of(ref: int) -> int:
    return ref >> 32


def refs_from_bytes(raw: bytes) -> PageRefs:
    return np.frombuffer(raw, dtype="<i8")


def page_ids(refs: PageRefs) -> npt.NDArray[np.int32]:
    """The page ids of references, as a block table row wants them."""
    return refs.astype(np.int32)  # keeps the low 32 bits
