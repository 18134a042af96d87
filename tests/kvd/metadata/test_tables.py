"""Header and tables: what they remember, when they are full; a crash at each of their stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from kvd.cache import CacheManager
from kvd.metadata import ENDED, FENCED, LIVE, ColdStart, Geometry, Metadata, create_metadata
from kvd.metadata.failpoints import FAILPOINTS
from kvd.metadata.header import MAX_FAILED_WARM_STARTS
from kvd.metadata.memory import open_metadata
from kvd.metadata.roots import MAX_NAMESPACE_BYTES
from kvd.recovery import recover
from kvd_shared.errors import BadRequest, OverLimit
from kvd_shared.namespace import Namespace
from kvd_shared.refs import GENERATION
from tests.kvd.metadata.worlds import process, small_geometry, small_metadata
from tests.kvd.tokens import page_tokens, unpacked

GEOMETRY = small_geometry(8, 8)
M = Namespace(model="m")


def copy(meta: Metadata) -> Metadata:
    return Metadata(bytearray(meta.to_bytes()), meta.geometry)


def at_each_store(meta: Metadata, operation: Callable[[], object]) -> list[tuple[str, Metadata]]:
    """The metadata as it stood at every failpoint, and after."""
    stood: list[tuple[str, Metadata]] = []
    FAILPOINTS.arm("*", action=lambda name: stood.append((name, copy(meta))))
    try:
        operation()
    finally:
        FAILPOINTS.disarm()
    return [*stood, ("after", copy(meta))]


# --- which pool it is


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_pages": 9}, "geometry"),
        ({"page_size": 16}, "geometry"),
        ({"page_bytes": 4096}, "geometry"),
        ({"layout": b"other"}, "geometry"),
        ({"model": b"other"}, "geometry"),
        ({"num_roots": 25}, "geometry"),
    ],
)
def test_another_pools_metadata_is_not_believed(changed: dict[str, int], reason: str) -> None:
    meta = create_metadata(GEOMETRY, "0123456789abcdef")
    with pytest.raises(ColdStart) as cold:
        open_metadata(meta.fd, replace(GEOMETRY, **changed))  # type: ignore[arg-type]
    assert cold.value.reason == reason
    assert open_metadata(os.dup(meta.fd), GEOMETRY).header.epoch == 2  # nothing was changed
    meta.close()


def test_a_file_or_an_unsealed_memfd_is_not_believed(tmp_path: object) -> None:
    meta = create_metadata(GEOMETRY, "0123456789abcdef")
    fd = os.memfd_create("other")
    os.write(fd, meta.to_bytes())
    with pytest.raises(ColdStart, match="sealed"):
        open_metadata(fd, GEOMETRY)
    os.close(fd)
    with pytest.raises(ColdStart):
        open_metadata(fd, GEOMETRY)
    meta.close()


def test_the_third_failed_warm_start_in_a_row_is_the_last() -> None:
    meta = create_metadata(GEOMETRY, "0123456789abcdef")
    for attempt in range(1, MAX_FAILED_WARM_STARTS + 1):
        assert open_metadata(os.dup(meta.fd), GEOMETRY).header.failed_warm_starts == attempt
    with pytest.raises(ColdStart) as cold:
        open_metadata(meta.fd, GEOMETRY)
    assert cold.value.reason == "failed_warm_starts"
    meta.header.warm_start_done()
    assert open_metadata(os.dup(meta.fd), GEOMETRY).header.epoch == 5
    assert meta.header.pool_id == "0123456789abcdef"
    meta.close()


# --- sessions


def test_ids_are_never_given_twice_not_even_of_sessions_that_are_gone() -> None:
    meta = small_metadata(8, 8)
    meta.sessions.opened(41, process(41))
    meta.sessions.gone(41)
    assert copy(meta).header.next_session_id == 42
    meta.header.next_session_id = 7
    assert meta.header.next_session_id == 42


def test_a_session_is_there_from_one_store_on_and_gone_with_another() -> None:
    meta = small_metadata(8, 8)
    stood = at_each_store(meta, lambda: meta.sessions.opened(3, process(3)))
    assert [len(one.sessions.load()) for _, one in stood] == [0, 0, 0, 1, 1]
    assert stood[-1][1].sessions.load()[3].process == process(3)
    assert int.from_bytes(meta.to_bytes()[meta.sessions.state_offset(3) :][:8], "little") == (
        meta.sessions.live_word(3)
    )
    for state, change in ((ENDED, meta.sessions.ended), (FENCED, meta.sessions.fenced)):
        stood = at_each_store(meta, partial(change, 3))
        words = [one.sessions.load()[3].state for _, one in stood]
        assert words[-2:] == [state, state]
        at = meta.sessions.state_offset(3)
        word = int.from_bytes(meta.to_bytes()[at : at + 8], "little")
        assert word not in (meta.sessions.live_word(3), 0)
    at = meta.sessions.state_offset(3)
    stood = at_each_store(meta, lambda: meta.sessions.gone(3))
    assert [len(one.sessions.load()) for _, one in stood] == [1, 0, 0, 0]
    assert meta.to_bytes()[at : at + 8] == bytes(8)  # no other session's word


@pytest.mark.parametrize("at", [0, 8, 9, 12, 16, 40, 64, 100])
def test_an_entry_of_which_a_byte_is_wrong_is_doubt_in_everything(at: int) -> None:
    """The seal, the session's number in the word and its state there, and what is sealed."""
    meta = small_metadata(8, 8)
    meta.sessions.opened(3, process(3))
    raw = bytearray(meta.to_bytes())
    raw[meta.sessions.offset + at] ^= 4
    with pytest.raises(ColdStart):
        Metadata(raw, meta.geometry).sessions.load()


def test_the_sessions_table_can_be_full_and_empty_again() -> None:
    cache = CacheManager(8, 8, meta=small_metadata(8, 8))
    for number in range(1, 65):
        cache.open_session(number, "w", 0.0, process(number))
    with pytest.raises(OverLimit):
        cache.open_session(65, "w", 0.0, process(65))
    assert 65 not in cache.sessions
    cache.release_session(cache.sessions[7])
    while cache.sweep(0.0):
        pass
    cache.open_session(66, "w", 0.0, process(66))
    assert set(copy(cache.meta).sessions.load()) == {*range(1, 67)} - {7, 65}


def test_a_dead_session_is_listed_until_its_last_page_is_free() -> None:
    """Else a page would be nobody's who is known, which is doubt in everything."""
    cache = CacheManager(8, 8, meta=small_metadata(8, 8))
    session = cache.open_session(1, "w", 0.0, process(1))
    cache.allocate(session, 3, None, 0.0)
    cache.release_session(session)
    for name, meta in at_each_store(cache.meta, lambda: cache.sweep(0.0)):
        again = CacheManager(8, 8, meta=meta)
        report = recover(again, 1.0).report
        assert report.private + report.free == 8, name
        assert report.sessions == (0 if report.private == 0 and 1 not in again.sessions else 1)


# --- roots


def test_a_root_that_is_gone_never_comes_back_under_its_number() -> None:
    meta = small_metadata(8, 8)
    seen = set()
    for _ in range(5):
        root = meta.roots.added(M)
        seen.add(root)
        assert copy(meta).roots.load() == {root: M}
        meta.roots.dead(root)
        meta = copy(meta)
        assert meta.roots.load() == {}
    assert len(seen) == 5


def test_a_root_is_there_from_one_store_on() -> None:
    meta = small_metadata(8, 8)
    stood = at_each_store(meta, lambda: meta.roots.added(M))
    assert [len(one.roots.load()) for _, one in stood] == [0, 0, 1, 1]
    stood = at_each_store(meta, lambda: meta.roots.dead(next(iter(meta.roots.ids()))))
    assert [len(one.roots.load()) for _, one in stood] == [1, 0, 0]


@pytest.mark.parametrize("why", ["full", "long"])
def test_what_has_no_room_in_the_table_is_served_and_forgotten(why: str) -> None:
    """Its pages are quarantined after a restart, and free after the grace."""
    geometry = Geometry(num_pages=8, page_size=8, num_roots=1, num_sessions=4, num_weights=4)
    cache = CacheManager(8, 8, meta=Metadata.new(geometry, "0123456789abcdef"))
    session = cache.open_session(1, "w", 0.0, process(1))
    names = [M, Namespace(model="n")]
    if why == "long":
        names = [Namespace(model="m" * MAX_NAMESPACE_BYTES)]
    for name in names:
        refs = cache.allocate(session, 1, None, 0.0)
        cache.publish(session, name, page_tokens("a"), refs, None, 0.0)
        assert cache.tree.walk(name, page_tokens("a"), 1, 0.0).num_pages == 1
    assert cache.meta.roots.num_unrecorded == 1
    meta = copy(cache.meta)
    again = CacheManager(8, 8, meta=meta)
    found = recover(again, 1.0)
    assert again.tree.walk(names[-1], page_tokens("a"), 1, 0.0).num_pages == 0
    assert found.report.dropped == {"unrecorded": 1}
    assert (found.report.matchable, found.report.quarantined) == (len(names) - 1, 1)
    found.dead(again.sessions[1], 1.0)
    while again.sweep(1.0):
        pass
    assert again.num_available == 8


# --- weights versions


def test_a_version_never_falls_at_no_store() -> None:
    meta = small_metadata(8, 8)
    for model in (None, "m", ""):
        meta.weights.raised(model, 3)
        stood = at_each_store(meta, partial(meta.weights.raised, model, 5))
        versions = [one.weights.load()[model] for _, one in stood]
        assert versions == [3, 3, 5, 5, 5]
    assert copy(meta).weights.load() == {None: 5, "m": 5, "": 5}


def test_a_version_that_cannot_be_recorded_is_refused() -> None:
    cache = CacheManager(8, 8, meta=small_metadata(8, 8))
    with pytest.raises(BadRequest):
        cache.raise_weights_version("m" * 2000, 1)
    assert not cache.versions.minimums and copy(cache.meta).weights.load() == {}


def test_stale_kv_does_not_come_back_even_if_its_flush_was_not_begun() -> None:
    """The daemon raises the version, and flushes in slices: it can die between the two."""
    cache = CacheManager(8, 8, meta=small_metadata(8, 8))
    session = cache.open_session(1, "w", 0.0, process(1))
    refs = cache.allocate(session, 1, None, 0.0)
    cache.publish(session, M, page_tokens("a"), refs, None, 0.0)
    cache.raise_weights_version("m", 1)
    again = CacheManager(8, 8, meta=copy(cache.meta))
    assert recover(again, 1.0).report.matchable == 0
    assert again.versions.minimums == {"m": 1}
    assert again.meta.roots.ids() == set()


# --- generations and starts


def test_states_of_sessions_are_far_apart() -> None:
    for one in (LIVE, ENDED, FENCED):
        for other in (LIVE, ENDED, FENCED):
            assert one == other or (one ^ other).bit_count() > 6


def test_a_restart_raises_no_generation_and_hands_out_free_pages_in_order() -> None:
    cache = CacheManager(4, 8, meta=small_metadata(4, 8))
    session = cache.open_session(1, "w", 0.0, process(1))
    refs = cache.allocate(session, 2, None, 0.0)
    cache.free(session, refs, 0.0)
    again = CacheManager(4, 8, meta=copy(cache.meta))
    recover(again, 1.0)
    other = again.open_session(2, "w", 1.0, process(2))
    assert unpacked(again.allocate(other, 4, None, 1.0)) == [GENERATION, GENERATION + 1, 2, 3]
