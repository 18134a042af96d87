"""What is where in the metadata of a pool, and how large it is."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass

from kvd.metadata.records import row_words
from kvd.metadata.roots import ROOT_BYTES
from kvd.metadata.sessions import SESSION_BYTES
from kvd.metadata.weights import WEIGHTS_BYTES
from kvd.versions import MAX_MODELS

MAX_ROOTS = 65_536
MAX_SESSIONS = 1024
LINE_BYTES = 64
HEADER_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What the metadata of one pool must agree on before a page is believed. `layout` and `model`
    are any stable names of the pages' layout and the model; b"" for a pool of any model."""

    num_pages: int
    page_size: int  # tokens
    page_bytes: int = 0
    layout: bytes = b""
    model: bytes = b""
    num_roots: int = 0  # 0: as many as there are pages, and at most MAX_ROOTS
    recorded: bool = True  # False: nothing that the pages hold, as nobody keeps it anyway
    num_sessions: int = MAX_SESSIONS
    num_weights: int = MAX_MODELS + 2  # one for all models, one to write before the old one goes

    @property
    def layout_digest(self) -> bytes:
        return hashlib.sha256(self.layout).digest()

    @property
    def model_digest(self) -> bytes:
        return hashlib.sha256(self.model).digest()


@dataclass(frozen=True, slots=True)
class Places:
    """Offsets in bytes. The sessions table has whole memory pages of its own: workers map it."""

    sessions: int
    sessions_bytes: int
    current: int
    owner: int
    weights: int
    roots: int
    num_roots: int
    rows: int
    num_rows: int
    num_bytes: int


def places(geometry: Geometry) -> Places:
    pages = geometry.num_pages
    num_roots = geometry.num_roots or min(MAX_ROOTS, max(16, pages))
    num_rows = pages
    if not geometry.recorded:
        num_roots = num_rows = 0
    sessions_bytes = _aligned(geometry.num_sessions * SESSION_BYTES, mmap.PAGESIZE)
    sessions = _aligned(HEADER_BYTES, mmap.PAGESIZE)
    current = sessions + sessions_bytes
    owner = _aligned(current + 8 * pages, LINE_BYTES)
    weights = _aligned(owner + 8 * pages, LINE_BYTES)
    roots = _aligned(weights + geometry.num_weights * WEIGHTS_BYTES, LINE_BYTES)
    rows = _aligned(roots + num_roots * ROOT_BYTES, mmap.PAGESIZE)
    end = _aligned(rows + num_rows * row_words(geometry.page_size) * 8, mmap.PAGESIZE)
    return Places(
        sessions, sessions_bytes, current, owner, weights, roots, num_roots, rows, num_rows, end
    )


def metadata_bytes(geometry: Geometry) -> int:
    """Of the whole memfd."""
    return places(geometry).num_bytes


def _aligned(num_bytes: int, to: int) -> int:
    return -(-num_bytes // to) * to
