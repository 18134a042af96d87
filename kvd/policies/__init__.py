"""Eviction policies: in which order unprotected nodes lose their pages."""

from __future__ import annotations

from collections.abc import Callable

from kvd.policies.hit_density import HitDensity
from kvd.policies.lru import Lru
from kvd.policies.policy import Policy
from kvd.policies.recompute_cost import recompute_cost

# By the name that a configuration gives; each is made for a pool of so many pages.
POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": lambda num_pages: Lru(),
    "density": HitDensity,
    "cost": lambda num_pages: HitDensity(num_pages, recompute_cost),
}

__all__ = ["POLICIES", "Policy"]
