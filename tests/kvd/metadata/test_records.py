"""Rows: one way of storing them for one, a few and many, and no damage that goes unseen."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvd.metadata import Geometry, Metadata, records
from kvd.metadata.checksum import Checksum
from kvd.retention import NO_WISH, Retention
from kvd_shared.refs import GENERATION
from tests.kvd.tokens import packed

WISH = Retention(priority=80, duration_s=2.0, ttl_s=9.5)


def metadata(page_size: int) -> Metadata:
    return Metadata.new(Geometry(num_pages=32, page_size=page_size, num_sessions=4), "0" * 16)


@pytest.mark.parametrize("page_size", [1, 4, 5, 8, 16])
@pytest.mark.parametrize("wish", [NO_WISH, WISH])
def test_pages_published_at_once_have_the_rows_of_pages_published_one_by_one(
    page_size: int, wish: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "SCRATCH_ROWS", 4)  # rows of more than one portion, too
    rng = random.Random(page_size)
    pages = rng.sample(range(32), 9)
    for count in (1, 2, 4, 5, 9):
        refs = pages[:count]
        tokens = rng.randbytes(4 * page_size * count)
        many, single = metadata(page_size), metadata(page_size)
        many.records.published(packed(refs), 31, 7, tokens, 3, 1.25, wish)
        after = 31
        for i, ref in enumerate(refs):
            page = tokens[4 * page_size * i : 4 * page_size * (i + 1)]
            single.records.published(packed([ref]), after, 7, page, 3, 1.25, wish)
            after = ref
        assert many.to_bytes() == single.to_bytes()
        assert many.records.are_intact(np.array(refs)).all()


def test_every_flip_of_one_or_two_bits_is_seen() -> None:
    meta = metadata(4)
    meta.records.published(packed([5]), None, 1, bytes(range(16)), 3, 1.0, NO_WISH)
    row, here = meta.records.rows[5], np.array([5])
    good = row.copy()
    bits = [(word, bit) for word in range(len(row)) for bit in range(64)]
    rng = random.Random(1)
    upper = [(word, bit) for word in range(1, len(row)) for bit in (62, 63)]
    pairs = [(a, b) for a in upper for b in upper if a < b]
    pairs += [(one, one) for one in bits] + [tuple(rng.sample(bits, 2)) for _ in range(2000)]  # type: ignore[misc]
    for one, other in pairs:
        for word, bit in {one, other}:
            row[word] ^= np.uint64(1 << bit)
        assert not meta.records.are_intact(here)[0], f"flips {one} and {other}"
        row[:] = good
    assert meta.records.are_intact(here)[0]


def test_a_row_of_zeros_and_one_of_an_earlier_use_are_none() -> None:
    meta = metadata(8)
    assert not meta.records.are_intact(np.arange(32)).any()
    assert Checksum(11).one(bytes(88)) != 0
    meta.records.published(packed([5]), None, 1, bytes(32), 3, 1.0, NO_WISH)
    meta.pages.freed(5 + GENERATION)
    assert not meta.records.are_intact(np.array([5]))[0]


def test_a_wish_makes_no_damaged_row_whole() -> None:
    meta = metadata(8)
    meta.records.published(packed([5, 6]), None, 1, bytes(64), 3, 1.0, NO_WISH)
    meta.records.rows[5, 9] ^= np.uint64(1)
    meta.records.retained(packed([5, 6]), WISH)
    assert meta.records.are_intact(np.array([5, 6])).tolist() == [False, True]
    meta.records.retained(packed([6]), NO_WISH)
    other = metadata(8)
    other.records.published(packed([5, 6]), None, 1, bytes(64), 3, 1.0, NO_WISH)
    assert (other.records.rows[6] == meta.records.rows[6]).all()


def test_both_ways_to_a_checksum_agree() -> None:
    rng = random.Random(2)
    for words in (1, 9, 23):
        checksum = Checksum(words)
        rows = [rng.randbytes(8 * words) for _ in range(50)]
        block = np.ones((50, words + 1), dtype=np.uint64)
        block[:, 1:] = np.frombuffer(b"".join(rows), dtype=np.uint64).reshape(50, words)
        assert checksum.of_rows(block).tolist() == [checksum.one(row) for row in rows]
