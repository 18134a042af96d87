"""Why pages are not cached any more: told exactly, page by page, while it is remembered."""

from __future__ import annotations

import random

import pytest

from kvd.departures import BUCKETS_S, REASONS, REMEMBERED, Departures, Histogram
from kvd.options import CacheOptions, TenantShare
from kvd.retention import NO_WISH, Retention
from kvd_shared.namespace import Namespace
from tests.kvd.paired_cache import PairedCache
from tests.kvd.tokens import page_tokens

M = Namespace(model="m")


def cached(
    pair: PairedCache, letters: str, wish: Retention = NO_WISH, where: Namespace = M
) -> list[int]:
    """Pages of these letters, published and let go one second later."""
    known = pair.model.tree.walk(where, pair.model.keys(page_tokens(letters)), pair.now)
    pages = pair.match(1, where, page_tokens(letters + "."))[1][1] if known else []
    more = len(letters) - len(pages)
    new = pair.allocate(1, more, None)[1] if more else []
    pair.publish(1, where, page_tokens(letters), pages + new, None, wish)
    pair.now += 1.0
    pair.free(1, pages + new)
    return [*pages, *new]


def why(pair: PairedCache, behind: int | Namespace, letter: str) -> tuple[str, float, float]:
    found = pair.core.tree.departures.at((behind, page_tokens(letter)))
    assert found is not None
    return found.reason, found.when_s, found.last_use_s


def test_an_evicted_page_is_known_by_what_stood_before_it() -> None:
    pair = PairedCache(4)
    first = cached(pair, "ab")
    cached(pair, "xy")
    pair.now = 5.0
    pair.evict(1)
    assert why(pair, first[0], "b") == ("evicted", 5.0, 1.0)
    assert pair.core.tree.departures.at((M, page_tokens("a"))) is None
    pair.evict(1)
    assert why(pair, M, "a") == ("evicted", 5.0, 1.0)


def test_each_way_to_leave_has_its_reason() -> None:
    tenant = TenantShare(salt=b"t", max_share=0.25)
    pair = PairedCache(16, options=CacheOptions(tenants=(tenant,)))
    theirs = Namespace(model="m", salt=b"t")
    cached(pair, "abcdef", where=theirs)
    assert pair.core.tree.departures.pages["over_share"] == 2
    cached(pair, "xy", Retention(ttl_s=2.0))
    pair.now += 3.0
    pair.sweep_all()
    assert why(pair, M, "x") == ("expired", pair.now, 2.0)
    cached(pair, "q")
    pair.flush(M)
    pair.sweep_all()
    assert why(pair, M, "q")[0] == "flushed"
    cached(pair, "r")
    pair.raise_weights_version("m", 1)
    pair.sweep_all()
    assert why(pair, M, "r")[0] == "stale_version"
    pages = pair.core.tree.departures.pages
    assert pages == {
        "evicted": 0, "over_share": 2, "expired": 2, "flushed": 1, "stale_version": 5,
    }  # fmt: skip


def test_flushed_pages_that_are_held_leave_with_their_last_hold_and_for_that_reason() -> None:
    pair = PairedCache(4)
    pages = pair.allocate(1, 2, None)[1]
    pair.publish(1, M, page_tokens("ab"), pages, None)
    pair.flush(M)
    pair.sweep_all()
    assert sum(pair.core.tree.departures.pages.values()) == 0
    pair.now = 7.0
    pair.free(1, pages)
    pair.now = 8.0
    pair.sweep_all()
    assert why(pair, M, "a") == ("flushed", 8.0, 7.0)


@pytest.mark.parametrize("seed", range(5))
def test_every_place_that_can_still_be_come_to_is_explained(seed: int) -> None:
    """The pairing compares all of them after each operation: see `agreement.agree_departures`."""
    rng = random.Random(seed)
    pair = PairedCache(24)
    for _ in range(60):
        if pair.core.tree.num_evictable + len(pair.core.free_list) >= 6:
            cached(pair, "".join(rng.choices("abc", k=rng.randint(1, 6))))
        pair.now += rng.choice([0.0, 0.5])
        pair.evict(rng.randint(0, 3))
    assert pair.model.tree.num_left["evicted"] == pair.core.tree.departures.pages["evicted"] > 50


def test_only_so_many_are_remembered_and_the_oldest_is_forgotten() -> None:
    departures = Departures()
    for i in range(REMEMBERED + 1):
        departures.note((i, b""), "evicted", 2, 0.0, 1.0, 4.0)
    assert departures.at((0, b"")) is None and departures.at((1, b"")) is not None
    assert departures.pages == {**dict.fromkeys(REASONS, 0), "evicted": 2 * (REMEMBERED + 1)}
    assert departures.lifetime.sum_s == 8.0 * (REMEMBERED + 1)
    assert departures.idle.sum_s == 6.0 * (REMEMBERED + 1)


def test_seconds_fall_into_the_bucket_of_the_first_bound_that_they_do_not_reach() -> None:
    histogram = Histogram()
    for i, bound in enumerate(BUCKETS_S):
        histogram.add(bound * 0.99, i + 1)
        histogram.add(bound, 100)
    assert histogram.counts == [1, *[100 + i + 1 for i in range(1, len(BUCKETS_S))], 100]
    seconds = sum(bound * (0.99 * (i + 1) + 100) for i, bound in enumerate(BUCKETS_S))
    assert histogram.sum_s == pytest.approx(seconds)
