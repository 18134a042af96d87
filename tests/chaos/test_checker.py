"""The checker's power: histories that no pool can have had are told apart from those it can."""

from __future__ import annotations

import numpy as np

from tests.chaos.checker import check, known_pages
from tests.chaos.history import RECORD, Kind, Records

PAGE = 7
USE, NEXT_USE = PAGE, 1 << 32 | PAGE  # two generations of it


def history(*events: tuple[float, Kind, int], pool: int = 1) -> Records:
    rows = [(0.0, pool, Kind.ATTACHED, 1), *((t, ref, kind, 0) for t, kind, ref in events)]
    return np.array(rows, dtype=RECORD)


def overlaps(ended_s: dict[str, float] | None = None, **histories: Records) -> int:
    return check(histories, ended_s or {}).count


def test_one_use_after_the_other_is_right() -> None:
    one = history((1, Kind.OWN, USE), (2, Kind.LET_GO, USE))
    other = history((3, Kind.OWN, NEXT_USE), (4, Kind.LET_GO, NEXT_USE))
    assert overlaps(one=one, other=other) == 0


def test_two_writers_at_once() -> None:
    one = history((1, Kind.OWN, USE), (4, Kind.LET_GO, USE))
    other = history((3, Kind.OWN, NEXT_USE), (5, Kind.LET_GO, NEXT_USE))
    assert overlaps(one=one, other=other) == 1
    same_use = history((3, Kind.OWN, USE), (5, Kind.LET_GO, USE))
    assert overlaps(one=one, other=same_use) == 1


def test_a_page_reused_while_it_is_read() -> None:
    reader = history((1, Kind.READ, USE), (4, Kind.LET_GO, USE))
    writer = history((2, Kind.OWN, NEXT_USE), (3, Kind.LET_GO, NEXT_USE))
    assert overlaps(reader=reader, writer=writer) == 1


def test_a_page_read_before_it_is_sealed() -> None:
    writer = history((1, Kind.OWN, USE), (4, Kind.SEALED, USE), (6, Kind.LET_GO, USE))
    early = history((3, Kind.READ, USE), (5, Kind.LET_GO, USE))
    late = history((4.5, Kind.READ, USE), (5, Kind.LET_GO, USE))
    assert overlaps(writer=writer, early=early) == 1
    assert overlaps(writer=writer, late=late) == 0


def test_many_may_read() -> None:
    readers = {f"r{i}": history((i, Kind.READ, USE), (9, Kind.LET_GO, USE)) for i in range(5)}
    assert check(readers, {}).count == 0


def test_a_killed_worker_has_its_pages_up_to_the_kill() -> None:
    killed = history((1, Kind.OWN, USE))
    early = history((5, Kind.OWN, NEXT_USE), (7, Kind.LET_GO, NEXT_USE))
    assert overlaps({"killed": 6.0}, killed=killed, early=early) == 1
    assert overlaps({"killed": 4.0}, killed=killed, early=early) == 0


def test_what_is_lost_with_its_session_is_nobodys() -> None:
    lost = history((1, Kind.OWN, USE), (3, Kind.LOST, 0))
    later = history((4, Kind.OWN, NEXT_USE), (7, Kind.LET_GO, NEXT_USE))
    assert overlaps(lost=lost, later=later) == 0
    at_once = history((2, Kind.OWN, NEXT_USE), (7, Kind.LET_GO, NEXT_USE))
    assert overlaps(lost=lost, at_once=at_once) == 1


def test_the_same_page_of_another_pool_is_another_page() -> None:
    one = history((1, Kind.OWN, USE), (4, Kind.LET_GO, USE))
    other = history((2, Kind.OWN, USE), (3, Kind.LET_GO, USE), pool=2)
    assert overlaps(one=one, other=other) == 0


def test_publishing_that_was_refused_leaves_the_page_to_its_writer() -> None:
    writer = history(
        (1, Kind.OWN, USE), (2, Kind.SEALED, USE), (3, Kind.OWN, USE), (6, Kind.LET_GO, USE)
    )
    reader = history((4, Kind.READ, USE), (5, Kind.LET_GO, USE))
    assert overlaps(writer=writer, reader=reader) == 1


def test_what_a_fenced_worker_read_is_nobodys_but_what_it_wrote_is_its_own() -> None:
    seen_ns = int(2.5e9)  # when it last saw that it was not fenced
    reader = history((1, Kind.READ, USE), (6, Kind.LET_GO, USE), (6, Kind.FENCED, seen_ns))
    later = history((3, Kind.OWN, NEXT_USE), (4, Kind.LET_GO, NEXT_USE))
    sooner = history((2, Kind.OWN, NEXT_USE), (4, Kind.LET_GO, NEXT_USE))
    assert overlaps(reader=reader, later=later) == 0
    assert overlaps(reader=reader, sooner=sooner) == 1
    held_on = history((1, Kind.READ, USE), (6, Kind.FENCED, seen_ns), (6, Kind.LOST, 0))
    assert overlaps(reader=held_on, later=later) == 0
    writer = history((1, Kind.OWN, USE), (6, Kind.FENCED, seen_ns), (7, Kind.LOST, 0))
    assert overlaps(writer=writer, later=later) == 1


def test_what_is_known_to_be_published() -> None:
    rows = [(1.0, 42, Kind.KNOWN, 3), (2.0, 42, Kind.KNOWN, 5), (3.0, 43, Kind.KNOWN, 1)]
    assert known_pages([np.array(rows, dtype=RECORD)]) == {42: 5, 43: 1}
