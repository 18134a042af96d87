"""How fast this worker computes prompts, as it has measured by itself."""

from __future__ import annotations

# Until something was measured: slow, so that a new worker rather waits for another one than
# computes the same prompt a second time. Its patience bounds what a wrong guess costs.
FIRST_GUESS = 100.0  # tokens/s
LEAST_TOKENS = 32  # of a step; fewer tell its fixed cost, not the pace
KEPT = 0.8  # of what was measured before, each time


class PrefillPace:
    """An average that forgets: tokens over seconds of the latest steps that computed prompts, long
    steps weighing more. What else ran in those steps (decoding) slows the pace, as it will again.

    Invariant: both sums are above 0, or both are 0.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens of prompts."""
        if num_tokens >= LEAST_TOKENS and seconds > 0:
            self._tokens = KEPT * self._tokens + num_tokens
            self._seconds = KEPT * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds if self._seconds else FIRST_GUESS


class StepPace:
    """How long a step takes, while there is always a next one. An average that forgets."""

    def __init__(self) -> None:
        self.seconds: float | None = None  # None: nothing was measured
        self._last_s: float | None = None

    def note(self, now: float) -> None:
        """A step has been computed."""
        if self._last_s is not None:
            took_s = now - self._last_s
            old = took_s if self.seconds is None else self.seconds
            self.seconds = KEPT * old + (1 - KEPT) * took_s
        self._last_s = now

    def pause(self) -> None:
        """There is nothing to do, or nothing can be done: the time until the next step is not a
        step's."""
        self._last_s = None
