"""Metadata of a size that can be copied after every operation, and who stands in it."""

from __future__ import annotations

import hashlib

from kvd.metadata import Geometry, Metadata, ProcessEntry


def small_geometry(num_pages: int, page_size: int) -> Geometry:
    return Geometry(
        num_pages=num_pages, page_size=page_size, num_roots=24, num_sessions=64, num_weights=8
    )


def small_metadata(num_pages: int, page_size: int) -> Metadata:
    return Metadata.new(small_geometry(num_pages, page_size), "0123456789abcdef")


def process(number: int) -> ProcessEntry:
    return ProcessEntry(
        token_digest=hashlib.sha256(b"token %d" % number).digest(),
        pid=1000 + number,
        start_time=777 * number,
        uid=1,
        gid=2,
        name=f"worker {number}",
        role="worker",
    )
