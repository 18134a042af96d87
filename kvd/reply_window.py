"""The last answers of a session, so that a request that is sent twice is done once.

A ring: request number n has place n modulo WINDOW, and a place is taken over by greater numbers
only. So a place that has a smaller number than n says for certain that n was never begun, however
the client chooses its numbers; one with a greater number says that nothing is known of n any more.
"""

from __future__ import annotations

from kvd_shared.errors import ReplyGone

WINDOW = 128  # numbers; a power of two
WINDOW_BYTES = 256 << 10  # of answers
_MASK = WINDOW - 1


class ReplyWindow:
    """Invariant: `_bytes` is what the kept answers have, at most WINDOW_BYTES; a number whose
    answer is awaited is in `routes`, and its place has no answer."""

    __slots__ = ("_answers", "_bytes", "routes", "seqs")

    def __init__(self) -> None:
        self.seqs = [0] * WINDOW
        self.routes: dict[int, bytes] = {}  # of what is being done in slices: where to answer
        self._answers: list[list[bytes] | None] = [None] * WINDOW
        self._bytes = 0

    def is_new(self, seq: int) -> bool:
        """Whether the request was never begun."""
        return self.seqs[seq & _MASK] < seq

    def again(self, seq: int, route: bytes) -> list[bytes] | None:
        """The answer of a request that was begun before; None: it is still being done, and will be
        answered there. Raises ReplyGone."""
        if seq in self.routes:
            self.routes[seq] = route
            return None
        place = seq & _MASK
        answer = self._answers[place]
        if self.seqs[place] != seq or answer is None:
            raise ReplyGone(
                f"request {seq} was sent before, or so much later ones were that its number is too "
                f"old: kept are the last {WINDOW} answers, if they are {WINDOW_BYTES >> 10} KiB "
                "together; number requests upwards",
                seq=seq,
            )
        return answer

    def begun(self, seq: int, route: bytes) -> None:
        """It is answered later."""
        self._take(seq & _MASK, seq)
        self.routes[seq] = route

    def ended(self, seq: int, answer: list[bytes]) -> bytes:
        """What was begun is done; returns where to answer."""
        route = self.routes.pop(seq)
        if self.seqs[seq & _MASK] == seq:  # not overtaken by one a whole ring later
            self.done(seq, answer)
        return route

    def done(self, seq: int, answer: list[bytes]) -> None:
        """It is answered now."""
        place = seq & _MASK
        self._take(place, seq)
        size = len(answer[0])
        if len(answer) > 1:
            size = sum(map(len, answer))
        if size > WINDOW_BYTES:
            return
        self._bytes += size
        self._answers[place] = answer
        while self._bytes > WINDOW_BYTES:
            place = (place + 1) & _MASK  # the oldest first, where numbers rise by one
            self._drop(place)

    def _take(self, place: int, seq: int) -> None:
        if self._answers[place] is not None:
            self._drop(place)
        self.seqs[place] = seq

    def _drop(self, place: int) -> None:
        answer = self._answers[place]
        if answer is not None:
            self._answers[place] = None
            self._bytes -= sum(map(len, answer))
