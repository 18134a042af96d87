"""At any point of any history, what a new daemon brings back is what could be matched: exactly."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.metadata.failpoints import FAILPOINTS, NAMES
from kvd.metadata.geometry import places
from kvd.metadata.sessions import LIVE
from kvd_shared.refs import page_of
from tests.kvd.metadata.oracle import Truth, paths, restarted, truth
from tests.kvd.pairing import Outcome
from tests.kvd.random_workers import RandomWorkers, random_steps

# Passed by operations that random workers do not do; each has its own test.
ELSEWHERE = ("start.", "ready.", "session_opened.", "recovered.", "publish_unrecorded.")


class Witness:
    """Plays a history, and remembers of each operation on the core what was true before and after
    it, and the metadata as it stood at every failpoint between."""

    def __init__(self, seed: int) -> None:
        self.workers = RandomWorkers(seed, check_every=1, strict=False)
        self.core: CacheManager = self.workers.pair.core
        self.now = 0.0
        self.passed: Counter[str] = Counter()
        self.moments: list[tuple[Truth, list[tuple[str, bytes]], Truth]] = []
        self._both = self.workers.pair._both
        self.workers.pair._both = self.both  # type: ignore[method-assign]

    def both(self, core: Callable[[], Any], model: Callable[[Any], Any]) -> Outcome:
        now = self.workers.pair.now
        before = truth(self.core, now)
        stood = [("before", self.core.meta.to_bytes())]
        FAILPOINTS.arm("*", action=lambda name: stood.append((name, self.core.meta.to_bytes())))
        try:
            outcome = self._both(core, model)
        finally:
            FAILPOINTS.disarm()
        self.passed.update(name for name, _ in stood[1:])
        stood.append(("after", self.core.meta.to_bytes()))
        if len(stood) > 2:
            self.moments.append((before, stood, truth(self.core, now)))
        return outcome

    def restart(self, raw: bytes, now: float | None = None) -> CacheManager | None:
        when = self.workers.pair.now if now is None else now
        found = restarted(raw, self.core, self.core.options, when)
        return found[0] if found else None


@pytest.mark.parametrize("seed", range(6))
def test_exactly_what_could_be_matched_comes_back(seed: int) -> None:
    for i in range(12):
        witness = Witness(1000 * seed + i)
        rng = random.Random(seed * 977 + i)
        for step in random_steps(rng, 40):
            witness.workers.play(step)
            if rng.random() < 0.25:
                comes_back(witness)


def comes_back(witness: Witness) -> None:
    core, now = witness.core, witness.workers.pair.now
    was = truth(core, now)
    found = restarted(core.meta.to_bytes(), core, core.options, now)
    assert found is not None, "cold"
    cache, recovery = found
    assert paths(cache) == was.matchable
    assert set(cache.free_list.check().tolist()) == was.free
    for session_id, session in core.sessions.items():
        if session_id > 0:
            own = {ref for ref, one in was.used.items() if one == session_id}
            assert cache.sessions[session_id].writing.keys() == own
            assert (session_id in recovery.waiting) == (not session.ended)
    assert {ref: cache.sealed[ref][0] for ref in was.tails} == was.tails
    fenced = recovery.end_grace(now)
    words = cache.meta.sessions.load()
    assert all(words[session_id].state != LIVE for session_id in fenced)
    while cache.sweep(now):
        pass
    check_cache(cache)
    own_pages = sum(len(session.writing) for session in cache.sessions.values())
    assert cache.num_available == core.num_pages - own_pages


@pytest.mark.parametrize("seed", range(6))
def test_a_crash_at_any_store_leaves_the_truth_or_a_miss(seed: int) -> None:
    """Every failpoint of every operation, and torn stores between each two of them."""
    passed: Counter[str] = Counter()
    for i in range(5):
        witness = Witness(5000 + 100 * seed + i)
        rng = random.Random(seed * 31 + i)
        for step in random_steps(rng, 40):
            witness.workers.play(step)
            for before, stood, after in witness.moments:
                last = stood[0][1]
                for _, raw in stood[1:]:
                    is_believable(witness, raw, before, after, exact=True)
                    if raw != last:
                        is_believable(witness, torn(rng, last, raw), before, after, exact=False)
                    last = raw
            witness.moments.clear()
        passed += witness.passed
    assert len(passed) > len(NAMES) / 2


def is_believable(
    witness: Witness, raw: bytes, before: Truth, after: Truth, *, exact: bool
) -> None:
    """`exact`: at a store's edge, so what was true before and is after must be there."""
    cache = witness.restart(raw)
    if cache is None:
        assert not exact, "cold, although no store was torn"
        return
    here = paths(cache)
    for ref, path in here.items():
        assert path in (before.matchable.get(ref), after.matchable.get(ref)), f"wrong page {ref}"
    if exact:
        both = before.matchable.keys() & after.matchable.keys()
        assert both <= here.keys(), f"lost {both - here.keys()}"
    known = before.matchable.keys() | before.used.keys() | before.held
    again = known & set(cache.free_list.check().tolist())
    assert not again, f"references {again} have been used, and will be given to others"
    free = {page_of(ref) for ref in cache.free_list.check().tolist()}
    kept = {ref for ref in before.used if before.used[ref] == after.used.get(ref)}
    for ref in kept | (before.held & after.held):
        assert page_of(ref) not in free, f"page {page_of(ref)} is free, and somebody uses it"
    for ref in before.used if exact else ():
        # what is published behind an expired page that is held does not come back
        behind_expired = ref in after.held and ref not in after.matchable
        lost = ref in cache.sealed and ref not in after.tails and not behind_expired
        assert not lost, f"nobody can publish {ref} any more, which session {before.used[ref]} had"
    for ref in (after.tails.keys() | before.tails.keys()) & cache.sealed.keys() if exact else ():
        tokens = cache.sealed[ref][0]
        assert tokens in (after.tails.get(ref), before.tails.get(ref)), f"{ref} has {tokens} tokens"
    for ref in kept:
        assert ref in cache.sessions[before.used[ref]].writing
    for session in cache.sessions.values():
        for ref in session.writing:
            page = page_of(ref)
            used = {page_of(r) for r, one in (*before.used.items(), *after.used.items())
                    if one == session.id}  # fmt: skip
            taken = page in {page_of(r) for r in before.free} or page in used
            assert taken or not exact, f"{session} has got page {page}"


def torn(rng: random.Random, old: bytes, new: bytes) -> bytes:
    """Each word that changes has come to memory, or has not."""
    words = bytearray(old)
    for at in range(0, len(old), 8):
        if old[at : at + 8] != new[at : at + 8] and rng.random() < 0.5:
            words[at : at + 8] = new[at : at + 8]
    return bytes(words)


@pytest.mark.parametrize(
    "field", ["header", "sessions", "current", "owner", "weights", "roots", "rows"]
)
def test_a_stray_write_is_a_miss(field: str) -> None:
    """One to three bytes overwritten anywhere: never a page as what it is not, never a page that
    is in use as a free one."""
    cold = warm = 0
    for seed in range(12):
        witness = Witness(9000 + seed)
        rng = random.Random(seed)
        for step in random_steps(rng, 30):
            witness.workers.play(step)
        was = truth(witness.core, witness.workers.pair.now)
        good = witness.core.meta.to_bytes()
        for _ in range(40):
            raw = stray(rng, good, witness.core, field)
            cache = witness.restart(raw)
            if cache is None:
                cold += 1
                continue
            warm += 1
            assert paths(cache).items() <= was.matchable.items()
            free = {page_of(ref) for ref in cache.free_list.check().tolist()}
            assert free <= {page_of(ref) for ref in was.free}
            for session in cache.sessions.values():
                own = {page_of(ref) for ref, one in was.used.items() if one == session.id}
                assert {page_of(ref) for ref in session.writing} == own or session.id <= 0
    assert cold + warm == 12 * 40


def stray(rng: random.Random, good: bytes, core: CacheManager, field: str) -> bytes:
    at = places(core.meta.geometry)
    ranges = {
        "header": (0, 1024),
        "sessions": (at.sessions, 4 * 256),
        "current": (at.current, 8 * core.num_pages),
        "owner": (at.owner, 8 * core.num_pages),
        "weights": (at.weights, 4 * 1048),
        "roots": (at.roots, 4 * 512),
        "rows": (at.rows, at.num_bytes - at.rows),
    }
    start, length = ranges[field]
    if field == "rows":
        length = core.meta.records.rows.nbytes
    raw = bytearray(good)
    if field == "owner" and rng.random() < 0.5:  # another's, or nobody's: but not the whole word
        page, other = rng.randrange(core.num_pages) * 8, rng.randrange(core.num_pages) * 8
        owner = rng.choice([bytes(4), good[start + other : start + other + 4]])
        raw[start + page : start + page + 4] = owner
        return bytes(raw)
    place = start + rng.randrange(length)
    for i in range(rng.randint(1, 3)):
        raw[min(place + i, len(raw) - 1)] ^= rng.randint(1, 255)
    return bytes(raw)
