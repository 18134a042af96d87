"""How one pool's cache behaves: eviction, tenants, lifetimes, limits. Values only, no I/O."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from kvd_shared.namespace import MAX_FIELD_BYTES

MIN_ROOM = 2  # pages that nobody may reserve: one is read while another is written


class OptionsError(ValueError):
    """Options that no cache can run with: names the value, its limit and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantShare:
    """What one tenant may count on, and may take, of a pool. A tenant is a namespace salt.

    Shares are fractions of the pool's pages (see `pages_of`). Tenants that are not listed share
    what is left without any promise.
    """

    salt: bytes = field(repr=False)  # of its namespaces, may be a secret; b"": who sends none
    name: str = ""  # for messages and reports; "" or unique
    min_share: float = 0.0  # of its cached pages: they go last, when nothing else can
    max_share: float = 1.0  # above this its own cached pages go first
    ttl_s: float | None = None  # instead of the pool's


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what one client can make the daemon do or remember."""

    max_prompt_tokens: int = 1 << 20  # of one match or publish
    max_pages_a_session: int | None = None  # held at once; None: the whole pool
    max_requests_a_session: int = 65536  # begun and not ended


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """One pool's options. `check_options` says whether they can hold together."""

    policy: str = "lru"  # who is evicted first: a name of kvd.policies.POLICIES
    operator_quota: float = 0.25  # fraction of the pool that `retain` may keep from eviction
    ttl_s: float | None = None  # KV unused for so long is matched no more; None: no end
    tenants: tuple[TenantShare, ...] = ()  # salts are unique
    limits: Limits = Limits()


def pages_of(share: float, num_pages: int) -> int:
    """Whole pages that a share of a pool is; what rounding errs by does not cost a page."""
    return math.floor(share * num_pages + 1e-6)


def check_options(options: CacheOptions, policies: Collection[str], num_pages: int) -> None:
    """Raises OptionsError for the first thing that a pool of `num_pages` pages cannot hold.

    Minimum shares and the operator's quota are promises about the same pages: together they must
    leave MIN_ROOM of the pool, for running requests that nobody promised anything. Otherwise one
    of them would be broken as soon as all are called in.
    """
    if options.policy not in policies:
        raise OptionsError(
            f"policy = {options.policy!r}: must be one of {', '.join(sorted(policies))}"
        )
    _check_share("operator_quota", options.operator_quota)
    _check_ttl("ttl_s", options.ttl_s)
    for name in ("max_prompt_tokens", "max_pages_a_session", "max_requests_a_session"):
        limit = getattr(options.limits, name)
        if limit is not None and limit < 1:
            raise OptionsError(f"limits.{name} = {limit}: must be at least 1")
    labels: dict[bytes, str] = {}
    names = [tenant.name for tenant in options.tenants if tenant.name]
    for number, tenant in enumerate(options.tenants):
        label = f"tenant {tenant.name!r}" if tenant.name else f"tenant[{number}]"
        _check_tenant(label, tenant)
        if tenant.salt in labels:
            raise OptionsError(
                f"{label} has the salt of {labels[tenant.salt]}: a salt is one tenant, "
                "give each its own or make them one"
            )
        if names.count(tenant.name) > 1:
            raise OptionsError(
                f"{label}: {names.count(tenant.name)} tenants have this name: give each its own"
            )
        labels[tenant.salt] = label
    promised = sum(pages_of(tenant.min_share, num_pages) for tenant in options.tenants)
    quota = pages_of(options.operator_quota, num_pages)
    if promised + quota > num_pages - MIN_ROOM:
        shares = sum(tenant.min_share for tenant in options.tenants)
        raise OptionsError(
            f"the tenants' min_share (sum {shares:g}) and operator_quota = "
            f"{options.operator_quota:g} reserve {promised} + {quota} of {num_pages} pages: "
            f"at least {MIN_ROOM} must be left for everybody; lower one of them"
        )


def _check_tenant(label: str, tenant: TenantShare) -> None:
    if len(tenant.salt) > MAX_FIELD_BYTES:
        raise OptionsError(
            f"{label}: salt of {len(tenant.salt)} bytes: the limit is {MAX_FIELD_BYTES} bytes, "
            "no namespace has a longer one; use a digest of it"
        )
    _check_share(f"{label}: min_share", tenant.min_share)
    _check_share(f"{label}: max_share", tenant.max_share)
    if tenant.min_share > tenant.max_share:
        raise OptionsError(
            f"{label}: min_share = {tenant.min_share:g} is over max_share = "
            f"{tenant.max_share:g}: lower the one or raise the other"
        )
    _check_ttl(f"{label}: ttl_s", tenant.ttl_s)


def _check_share(label: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:  # also what is not a number
        raise OptionsError(f"{label} = {share:g}: must be from 0 to 1, a fraction of the pool")


def _check_ttl(label: str, ttl_s: float | None) -> None:
    if ttl_s is not None and not (math.isfinite(ttl_s) and ttl_s > 0):
        raise OptionsError(
            f"{label} = {ttl_s:g}: must be a finite number of seconds over 0; "
            "leave it out to keep KV until its pages are needed"
        )
