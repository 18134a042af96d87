"""The one way in which metadata is not believed."""

from __future__ import annotations


class ColdStart(Exception):
    """Nothing of the old pool can be trusted, or is there: start with new memory and a new pool id.
    `reason` is one word for counters and logs."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
