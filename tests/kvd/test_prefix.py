"""How far two byte strings agree, against comparing unit by unit."""

from __future__ import annotations

import random

import pytest

from kvd.prefix import common_units


@pytest.mark.parametrize("unit", [4, 8, 32])
def test_units_are_equal_up_to_the_first_that_differs_in_any_byte(unit: int) -> None:
    rng = random.Random(unit)
    for _ in range(2000):
        limit = rng.choice([0, 1, 2, 3, 7, 8, 9, 31, 64])
        start, at = rng.randint(0, 3) * unit, rng.randint(0, 40)
        same = rng.randbytes(limit * unit)
        edge = bytearray(rng.randbytes(start) + same + rng.randbytes(rng.randint(0, 2) * unit))
        data = rng.randbytes(at) + same + rng.randbytes(rng.randint(0, 2) * unit)
        expected = limit
        if limit and rng.random() < 0.8:
            differ = rng.randrange(limit * unit)
            edge[start + differ] ^= 1 << rng.randrange(8)
            expected = differ // unit
        assert common_units(edge, start, data, at, limit, unit) == expected
        assert common_units(bytes(edge), start, data, at, limit, unit) == expected


def test_no_view_of_an_edge_is_left_behind_that_would_keep_it_from_growing() -> None:
    edge = bytearray(b"abcdefgh")
    assert common_units(edge, 0, b"abcdxxxx", 0, 2, 4) == 1
    edge += b"more"
