from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvd.options import CacheOptions, Limits, OptionsError, TenantShare, check_options, pages_of

POLICIES = {"lru", "other"}
ACME = TenantShare(salt=b"a", name="acme")


def check(num_pages: int = 100, **changes: Any) -> None:
    check_options(replace(CacheOptions(), **changes), POLICIES, num_pages)


def refusal(num_pages: int = 100, **changes: Any) -> str:
    with pytest.raises(OptionsError) as error:
        check(num_pages, **changes)
    return str(error.value)


@pytest.mark.parametrize("num_pages", [2, 3, 4, 1 << 20])
def test_the_defaults_fit_every_pool(num_pages: int) -> None:
    check(num_pages)


def test_options_at_their_limits_are_accepted() -> None:
    tenants = (
        replace(ACME, min_share=0.5, max_share=0.5, ttl_s=0.001),
        TenantShare(salt=b"", min_share=0.0, max_share=0.0),
        TenantShare(salt=b"x" * 1024, min_share=0.23, max_share=1.0),
    )
    limits = Limits(max_prompt_tokens=1, max_pages_a_session=1, max_requests_a_session=1)
    check(policy="other", operator_quota=0.25, ttl_s=1.0, tenants=tenants, limits=limits)
    check(operator_quota=0.0, tenants=(replace(ACME, min_share=0.98),))
    check(operator_quota=0.98)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "fifo"}, "policy = 'fifo': must be one of lru, other"),
        ({"operator_quota": 1.5}, "operator_quota = 1.5: must be from 0 to 1"),
        ({"operator_quota": -0.1}, "operator_quota = -0.1: must be from 0 to 1"),
        ({"operator_quota": float("nan")}, "operator_quota = nan: must be from 0 to 1"),
        ({"ttl_s": 0.0}, "ttl_s = 0: must be a finite number of seconds over 0"),
        ({"ttl_s": -3.0}, "ttl_s = -3: must be a finite"),
        ({"ttl_s": float("inf")}, "ttl_s = inf: must be a finite"),
        ({"limits": Limits(max_prompt_tokens=0)}, "limits.max_prompt_tokens = 0: must be at l"),
        ({"limits": Limits(max_pages_a_session=0)}, "limits.max_pages_a_session = 0: must be"),
        ({"limits": Limits(max_requests_a_session=-1)}, "limits.max_requests_a_session = -1: "),
    ],
)
def test_a_value_out_of_its_limits_is_named_with_them(
    changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_share": 1.1}, "tenant 'acme': min_share = 1.1: must be from 0 to 1"),
        ({"max_share": -0.1}, "tenant 'acme': max_share = -0.1: must be from 0 to 1"),
        ({"max_share": float("nan")}, "max_share = nan: must be"),
        ({"min_share": 0.5, "max_share": 0.25}, "min_share = 0.5 is over max_share = 0.25"),
        ({"ttl_s": 0.0}, "tenant 'acme': ttl_s = 0: must be a finite"),
        ({"salt": b"x" * 1025}, "tenant 'acme': salt of 1025 bytes: the limit is 1024"),
        ({"name": "", "min_share": 2.0}, "tenant[0]: min_share = 2"),
    ],
)
def test_a_tenant_that_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(tenants=(replace(ACME, **changes),))


def test_two_tenants_of_one_salt_or_name_are_refused_without_showing_the_salt() -> None:
    secret = replace(ACME, salt=b"hunter2")
    message = refusal(tenants=(secret, TenantShare(salt=b"b"), replace(secret, name="other")))
    assert "tenant 'other' has the salt of tenant 'acme'" in message
    assert "hunter2" not in message + repr(CacheOptions(tenants=(secret,)))
    assert "2 tenants have this name" in refusal(tenants=(ACME, replace(ACME, salt=b"b")))


def test_promises_must_leave_two_pages_for_everybody() -> None:
    """Counted in whole pages: shares that look full can still leave room in a large pool."""
    half, third = replace(ACME, min_share=0.5), TenantShare(salt=b"b", min_share=0.3)
    message = refusal(tenants=(half, third))
    assert "min_share (sum 0.8) and operator_quota = 0.25 reserve 80 + 25 of 100 pages" in message
    check(operator_quota=0.18, tenants=(half, third))
    assert "reserve 80 + 19 of 100" in refusal(operator_quota=0.19, tenants=(half, third))
    check(num_pages=1000, operator_quota=0.198, tenants=(half, third))
    assert "reserve 0 + 100 of 100" in refusal(operator_quota=1.0)


def test_a_share_is_whole_pages_and_rounding_errors_cost_none() -> None:
    assert 0.29 * 100 < 29  # as floating point has it
    assert pages_of(0.29, 100) == 29
    assert pages_of(0.299, 100) == 29
    assert pages_of(0.25, 3) == 0
    assert pages_of(1.0, 1 << 31) == 1 << 31
