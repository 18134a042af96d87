"""How much longer, or shorter, than plain eviction order some pages are to be kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kvd_shared.errors import BadRequest, brief

# As in TensorRT-LLM, so that engines' settings carry over; lower ones are evicted before it.
DEFAULT_PRIORITY = 35
MAX_PRIORITY = 100
_FIELDS = {"priority", "duration_s", "ttl_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What a publisher or holder wishes for pages.

    `priority` 0..100: of two evictable pages the one of lower priority goes first. It falls back
    to the default `duration_s` after the pages' last hold has first ended (None: never).
    `ttl_s`: the pages cannot be matched later than this after their last use (None: what the
    configuration says).
    """

    priority: int = DEFAULT_PRIORITY
    duration_s: float | None = None
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        """Raises BadRequest."""
        if type(self.priority) is not int or not 0 <= self.priority <= MAX_PRIORITY:
            raise BadRequest(
                f"priority {brief(self.priority)}: must be a whole number from 0 to {MAX_PRIORITY}"
            )
        for name in ("duration_s", "ttl_s"):
            seconds = getattr(self, name)
            if seconds is None:
                continue
            if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
                raise BadRequest(
                    f"{name} = {brief(seconds)}: must be a number of seconds above 0, or nil"
                )

    @classmethod
    def from_wire(cls, wire: Any) -> Retention:
        """Raises BadRequest. nil is no wish."""
        if wire is None:
            return NO_WISH
        if not isinstance(wire, dict) or wire.keys() != _FIELDS:
            raise BadRequest(f"retention must be nil or a map with exactly {sorted(_FIELDS)}")
        return cls(**wire)


NO_WISH = Retention()
