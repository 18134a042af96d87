"""What stays cached and what goes first: wishes, lifetimes, shares, operators, flushes."""

from __future__ import annotations

from kvd.options import CacheOptions, TenantShare
from kvd.retention import NO_WISH, Retention
from kvd_shared.namespace import Namespace
from tests.kvd.paired_cache import PairedCache
from tests.kvd.tokens import page_tokens

M = Namespace(model="m")
S, T = Namespace(model="m", salt=b"s"), Namespace(model="m", salt=b"t")
SHARES = CacheOptions(
    tenants=(
        TenantShare(salt=b"s", min_share=0.25),
        TenantShare(salt=b"t", max_share=0.5, ttl_s=3.0),
    ),
    operator_quota=0.25,
)


def cached(
    pair: PairedCache, letters: str, wish: Retention = NO_WISH, where: Namespace = M
) -> list[int]:
    """Pages of these letters, published and let go, a second after what was done before."""
    pair.now += 1.0
    pages: list[int] = pair.allocate(1, len(letters), None)[1]
    assert pair.publish(1, where, page_tokens(letters), pages, None, wish)[0] == "ok"
    pair.free(1, pages)
    return pages


def found(pair: PairedCache, letters: str, where: Namespace = M) -> int:
    """How many pages of these letters are cached."""
    tokens: int = pair.probe(1, where, page_tokens(letters + "."))[1]
    return tokens // 8


def hold(pair: PairedCache, letters: str, where: Namespace = M) -> list[int]:
    refs: list[int] = pair.match(2, where, page_tokens(letters + "."))[1][1]
    return refs


# --- priorities


def test_the_lower_priority_goes_first_and_among_equals_the_longest_unused() -> None:
    pair = PairedCache(16)
    for letters, priority in (("a", 80), ("b", 35), ("c", 10), ("d", 80), ("e", 10)):
        cached(pair, letters, Retention(priority=priority))
    for gone in "cebad":
        assert found(pair, gone) == 1
        pair.evict(1)
        assert found(pair, gone) == 0


def test_a_beginning_of_low_priority_waits_for_what_stands_behind_it() -> None:
    pair = PairedCache(8)
    pages = cached(pair, "ab", Retention(priority=0))
    hold(pair, "ab")
    pair.retain(2, pages[1:], Retention(priority=90))
    pair.free(2, pages)
    cached(pair, "x", Retention(priority=50))
    pair.evict(1)
    assert (found(pair, "ab"), found(pair, "x")) == (2, 0)
    cached(pair, "y", Retention(priority=95))
    pair.evict(1)
    assert (found(pair, "ab"), found(pair, "y")) == (1, 1)
    pair.evict(1)
    assert (found(pair, "ab"), found(pair, "y")) == (0, 1)


def test_a_priority_falls_back_when_its_time_after_the_first_use_is_over() -> None:
    pair = PairedCache(8)
    cached(pair, "a", Retention(priority=90, duration_s=4.0))
    cached(pair, "b")
    pair.now += 2.0
    pair.free(2, hold(pair, "a"))  # does not make it last longer
    pair.now += 1.5
    pair.sweep_all()
    cached(pair, "c")
    pair.evict(1)
    assert found(pair, "a") == 1 and found(pair, "b") == 0
    pair.now += 2.0
    pair.sweep_all()
    cached(pair, "d")
    pair.evict(2)
    assert [found(pair, letter) for letter in "acd"] == [0, 0, 1]


def test_a_wish_for_the_default_priority_changes_no_order_when_its_time_is_over() -> None:
    pair = PairedCache(8)
    cached(pair, "a", Retention(duration_s=2.0))
    cached(pair, "b")
    pair.now += 3.0
    pair.sweep_all()
    pair.evict(1)
    assert (found(pair, "a"), found(pair, "b")) == (0, 1)


# --- lifetimes


def test_pages_expire_when_they_have_been_unused_for_so_long_and_not_while_held() -> None:
    pair = PairedCache(8, options=CacheOptions(ttl_s=5.0))
    pages = cached(pair, "ab")
    pair.now += 4.0
    assert found(pair, "ab") == 2
    hold(pair, "a")
    pair.now += 1.0
    assert found(pair, "ab") == 1  # b was not used
    pair.now += 60.0
    pair.sweep_all()
    assert found(pair, "ab") == 1
    pair.free(2, pages[:1])
    pair.now += 4.5
    assert found(pair, "a") == 1
    pair.now += 0.5
    assert found(pair, "a") == 0
    pair.sweep_all()
    assert len(pair.core.free_list) == 8


def test_a_wish_for_a_lifetime_goes_before_the_tenants_and_that_before_the_pools() -> None:
    options = CacheOptions(ttl_s=50.0, tenants=SHARES.tenants, operator_quota=0.25)
    pair = PairedCache(16, options=options)
    cached(pair, "a", Retention(ttl_s=10.0), where=T)
    cached(pair, "b", where=T)
    cached(pair, "c", where=S)
    pair.now += 3.0
    assert (found(pair, "a", T), found(pair, "b", T), found(pair, "c", S)) == (1, 0, 1)
    pair.now += 47.0
    assert (found(pair, "a", T), found(pair, "c", S)) == (0, 0)


def test_what_was_used_again_before_it_expired_expires_later_and_by_itself() -> None:
    pair = PairedCache(8, options=CacheOptions(ttl_s=5.0))
    cached(pair, "a")
    pair.now += 3.0
    pair.free(2, hold(pair, "a"))
    pair.now += 3.0
    pair.sweep_all()
    assert found(pair, "a") == 1
    pair.now += 2.0
    pair.sweep_all()
    assert len(pair.core.free_list) == 8


# --- tenants


def test_a_tenant_over_its_maximum_gives_up_its_own_oldest_pages() -> None:
    pair = PairedCache(16, options=SHARES)
    cached(pair, "xyz")
    cached(pair, "abcdef", where=T)
    cached(pair, "ghijk", where=T)
    assert pair.core.tree.eviction.tenants[2].num_pages == 8
    assert (found(pair, "abcdef", T), found(pair, "ghijk", T), found(pair, "xyz")) == (3, 5, 3)


def test_a_tenant_that_holds_more_than_its_maximum_is_brought_down_as_it_lets_go() -> None:
    pair = PairedCache(16, options=SHARES)
    pages = pair.allocate(1, 10, None)[1]
    pair.publish(1, T, page_tokens("abcdefghij"), pages, None)
    assert found(pair, "abcdefghij", T) == 10
    pair.free(1, pages[9:])
    pair.free(1, pages[:9])
    assert found(pair, "abcdefghij", T) == 8


def test_a_tenant_gives_up_its_own_pages_though_another_is_over_its_maximum_too() -> None:
    """What a dead session leaves is not looked at until somebody needs pages."""
    shares = tuple(TenantShare(salt=salt, max_share=0.25) for salt in (b"s", b"t"))
    pair = PairedCache(16, options=CacheOptions(tenants=shares))
    pages = pair.allocate(3, 6, None)[1]
    pair.publish(3, S, page_tokens("abcdef"), pages, None)
    pair.release_session(3)
    pair.sweep_all()
    cached(pair, "uvwxyz", where=T)
    assert (found(pair, "abcdef", S), found(pair, "uvwxyz", T)) == (6, 4)


def test_of_all_tenants_one_that_is_over_its_maximum_goes_first() -> None:
    """Though its pages were used last."""
    tenants = (TenantShare(salt=b"t", max_share=0.25),)
    pair = PairedCache(16, options=CacheOptions(tenants=tenants))
    pages = pair.allocate(3, 6, None)[1]
    pair.publish(3, T, page_tokens("abcdef"), pages, None)
    cached(pair, "xyz")
    pair.now += 1.0
    pair.release_session(3)
    pair.sweep_all()
    pair.evict(2)
    assert (found(pair, "abcdef", T), found(pair, "xyz")) == (4, 3)
    pair.evict(1)
    assert (found(pair, "abcdef", T), found(pair, "xyz")) == (4, 2)


def test_between_tenants_the_lower_priority_goes_first() -> None:
    pair = PairedCache(16, options=CacheOptions(tenants=(TenantShare(salt=b"t"),)))
    cached(pair, "x", Retention(priority=80))
    cached(pair, "a", Retention(priority=10), where=T)
    pair.evict(1)
    assert (found(pair, "a", T), found(pair, "x")) == (0, 1)


def test_pages_within_a_minimum_share_go_last_and_go_when_nothing_else_can() -> None:
    pair = PairedCache(16, options=SHARES)
    cached(pair, "abcdef", Retention(priority=0), where=S)
    cached(pair, "uvwxyz", Retention(priority=90))
    pair.evict(8)  # two that are over the minimum of four, and then the others'
    assert (found(pair, "abcdef", S), found(pair, "uvwxyz")) == (4, 0)
    assert pair.allocate(2, 16, None)[0] == "ok"


def test_between_tenants_the_longest_unused_goes_first() -> None:
    pair = PairedCache(32, options=SHARES)
    cached(pair, "abcdefghij", where=S)
    cached(pair, "klm")
    cached(pair, "n", where=T)
    pair.now += 1.0
    pair.free(2, hold(pair, "abcdefghij", S))
    pair.evict(4)
    assert (found(pair, "klm"), found(pair, "n", T), found(pair, "abcdefghij", S)) == (0, 0, 10)


# --- operators


def test_what_operators_retain_stays_within_their_quota_and_for_their_time() -> None:
    pair = PairedCache(8, options=CacheOptions(operator_quota=0.5))
    cached(pair, "abc")
    cached(pair, "xy")
    number, tokens = pair.operator_retain(M, page_tokens("abc"), None)[1]
    assert tokens == 3 * 8
    assert pair.operator_retain(M, page_tokens("xy"), None)[0] == "OVER_QUOTA"
    assert pair.operator_retain(M, page_tokens("ab"), 5.0)[0] == "ok"  # counted already
    pair.evict(8)
    assert (found(pair, "abc"), found(pair, "xy")) == (3, 0)
    pair.operator_release(number)
    pair.evict(8)
    assert found(pair, "abc") == 2
    pair.now += 5.0
    pair.tick()
    pair.evict(8)
    assert found(pair, "abc") == 0


# --- what must not come back


def test_a_flush_ends_matches_at_once_and_frees_pages_as_they_are_let_go() -> None:
    pair = PairedCache(8)
    pages = cached(pair, "abc")
    hold(pair, "ab")
    pair.flush(M)
    assert found(pair, "abc") == 0
    pair.sweep_all()
    assert len(pair.core.free_list) == 6 and pair.core.tree.num_detached == 2
    mine = pair.allocate(2, 1, None)[1]
    assert pair.publish(2, M, page_tokens("c"), mine, pages[1])[0] == "DETACHED"
    assert pair.publish(2, M, page_tokens("a"), mine, None)[0] == "ok"
    assert found(pair, "abc") == 1
    pair.free(2, pages[:2])
    pair.sweep_all()
    assert len(pair.core.free_list) == 7


def test_flushed_pages_go_before_any_that_can_be_matched() -> None:
    pair = PairedCache(8)
    cached(pair, "ab", where=S)
    cached(pair, "cd", Retention(priority=100))
    pair.flush(M)
    pair.evict(2)
    assert found(pair, "ab", S) == 2 and pair.core.tree.departures.pages["flushed"] == 2


def test_a_raised_version_of_one_model_leaves_the_others() -> None:
    pair = PairedCache(16)
    old, new, other = (
        Namespace(model=m, weights_version=v) for m, v in (("m", 1), ("m", 2), ("n", 1))
    )
    for where in (old, new, other):
        cached(pair, "a", where=where)
    mine = hold(pair, "a", old)
    pair.raise_weights_version("m", 2)
    assert [found(pair, "a", where) for where in (old, new, other)] == [0, 1, 1]
    pages = pair.allocate(2, 1, None)[1]
    assert pair.publish(2, old, page_tokens("b"), pages, mine[0])[0] == "STALE_VERSION"
    assert pair.publish(2, old, page_tokens("b"), pages, None)[0] == "STALE_VERSION"
    assert pair.match(2, old, page_tokens("a."))[1][2] == "stale_version"
    pair.raise_weights_version(None, 3)
    assert [found(pair, "a", where) for where in (old, new, other)] == [0, 0, 0]
    assert pair.raise_weights_version("m", 3)[0] == "BAD_REQUEST"
