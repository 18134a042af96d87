"""How far two byte strings agree, in whole units: the one comparison on which every match rests."""

from __future__ import annotations


def common_units(
    edge: bytes | bytearray, start: int, data: bytes, at: int, limit: int, unit: int
) -> int:
    """How many units of `unit` bytes are equal, at most `limit`, in `edge` from byte `start` on and
    in `data` from byte `at` on. Both are at least `limit` units long from there.

    Compares with memcmp and without copies: the whole first, then by halves, which together read
    no byte twice that was found equal.
    """
    with memoryview(edge) as view:
        if data.startswith(view[start : start + limit * unit], at):
            return limit
        equal, end = 0, limit  # the first `equal` units agree, and not all of the first `end` do
        while end - equal > 1:
            middle = (equal + end) // 2
            if data.startswith(
                view[start + equal * unit : start + middle * unit], at + equal * unit
            ):
                equal = middle
            else:
                end = middle
        return equal
