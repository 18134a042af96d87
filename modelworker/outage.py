"""How long kvd has been away, and when to look for it again."""

from __future__ import annotations

RETRY_S = 0.05


class Outage:
    """`limit_s`: for so long nobody is told. Invariant: `lasted` is 0 when nothing is wrong."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._since_s: float | None = None
        self._next_try_s = float("-inf")

    def begin(self, now: float) -> bool:
        """Something went wrong. Returns whether that is news."""
        news = self._since_s is None
        self._since_s = now if self._since_s is None else self._since_s
        return news

    def end(self) -> None:
        """kvd answers as it should."""
        self._since_s = None

    def lasted(self, now: float) -> float:
        return 0.0 if self._since_s is None else now - self._since_s

    def is_long(self, now: float) -> bool:
        """Longer than anybody should wait untold."""
        return self.lasted(now) > self.limit_s

    def may_try(self, now: float) -> bool:
        """Whether it is time to look again; counts as having looked."""
        if now < self._next_try_s:
            return False
        self._next_try_s = now + RETRY_S
        return True
