"""Host-wide ageing: who may take pages when they are short, and who is asked to give some back.

Every sequence gets a number when it begins; a lower number is older. A request that is refused
pages leaves a *demand*. Rules:

1. Pages go to growing sequences before new ones, and among each by age: what older demands are
   waiting for is not handed to a younger request.
2. The oldest growing demand, or an admission demand that is the oldest of all active requests, may
   ask the youngest running sequence younger than itself to yield, one at a time. One that has not
   yielded for YIELD_PATIENCE_S (its worker hangs) is passed over: the next may be asked as well.

So the oldest sequence is never preempted, and while its demand stands something is always given
back: it finishes, and then the next is the oldest. This rests on two things that workers see to: a
sequence that waits to start holds nothing, and one that is asked to yield does.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvd.session import Session
from kvd_shared.errors import UnknownRequest

YIELD_PATIENCE_S = 2.0


@dataclass(slots=True)
class Request:
    """One sequence. `demand` pages were refused last (0: none); `asked` to yield, not yet done;
    `overdue`: it was asked long ago, as far as `tick` has seen."""

    number: int
    session: Session
    running: bool = False
    demand: int = 0
    asked: bool = False
    asked_since_s: float | None = None  # when `tick` first saw that it was
    overdue: bool = False


class AgeQueue:
    """Invariants: numbers rise and are never reused; a request that yielded is not running; at
    most one request is asked to yield, but for overdue ones; `_active` are the requests that run
    or have a demand."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}  # by number, so by age
        self._of_session: dict[Session, dict[int, Request]] = {}
        self._active: dict[int, Request] = {}  # few, where many may wait
        self._next = 1

    def begin(self, session: Session, count: int) -> int:
        """Number `count` sequences; returns the first of their consecutive numbers."""
        first = self._next
        self._next += count
        own = self._of_session.setdefault(session, {})
        for number in range(first, self._next):
            self._requests[number] = own[number] = Request(number, session)
        return first

    def get(self, session: Session, number: int) -> Request:
        request = self._requests.get(number)
        if request is None or request.session is not session:
            raise UnknownRequest(
                f"request {number} is not one that this session has begun and not ended"
            )
        return request

    def end(self, request: Request) -> None:
        del self._requests[request.number]
        own = self._of_session[request.session]
        del own[request.number]
        if not own:
            del self._of_session[request.session]
        self._active.pop(request.number, None)

    def drop_session(self, session: Session) -> None:
        for request in self.of_session(session):
            self.end(request)

    def served(self, request: Request) -> None:
        """The request got what it wanted."""
        request.running, request.demand = True, 0
        self._active[request.number] = request

    def wants_nothing(self, request: Request) -> None:
        """What a request that does not run was refused before, it does not want now."""
        request.demand = 0
        self._active.pop(request.number, None)

    def yielded(self, request: Request) -> None:
        """The request gave its pages back and queues again, with its old number."""
        request.running, request.demand, request.asked = False, 0, False
        request.asked_since_s, request.overdue = None, False
        self._active.pop(request.number, None)

    def available_to(self, request: Request | None, available: int) -> int:
        """How many of the `available` pages this request may take; others wait for the rest.

        Callers without a request number come after all who have one.
        """
        for other in self._active.values():
            if not other.demand or other is request:
                continue
            older = request is None or other.number < request.number
            if request is not None and request.running:
                ahead = other.running and older
            else:
                ahead = other.running or older
            if ahead:
                available -= other.demand
        return max(available, 0)

    def refuse(self, request: Request, wanted: int) -> Request | None:
        """Note the demand of a refused request; returns who is to be asked to yield, if anyone."""
        request.demand = wanted
        self._active[request.number] = request
        if request.asked:
            return request  # word of it was lost: without a second one, both would wait for ever
        active = sorted(self._active.values(), key=lambda r: r.number)
        growing = [r for r in active if r.running and r.demand]
        oldest = growing[0] if growing else active[0]
        if oldest is not request or any(r.asked and not r.overdue for r in active):
            return None
        younger = [r for r in active if r.running and not r.asked and r.number > request.number]
        if not younger:
            return None
        younger[-1].asked = True
        return younger[-1]

    def tick(self, now: float) -> None:
        """To be called now and then: finds who has been asked to yield for too long."""
        for request in self._active.values():
            if not request.asked:
                continue
            if request.asked_since_s is None:
                request.asked_since_s = now
            request.overdue = now - request.asked_since_s >= YIELD_PATIENCE_S

    def of_session(self, session: Session) -> list[Request]:
        return list(self._of_session.get(session, {}).values())

    def __len__(self) -> int:
        return len(self._requests)

    def counts(self) -> tuple[int, int]:
        """(running, waiting) requests."""
        running = sum(r.running for r in self._active.values())
        return running, len(self._requests) - running

    def check(self) -> None:
        asked = [r for r in self._requests.values() if r.asked and not r.overdue]
        assert len(asked) <= 1, f"asked to yield at a time: {asked}"
        active = {n: r for n, r in self._requests.items() if r.running or r.demand}
        assert active == self._active
        assert all(n < self._next for n in self._requests)
        own = [r for of_one in self._of_session.values() for r in of_one.values()]
        assert sorted(r.number for r in own) == sorted(self._requests)
        assert all(self._of_session.values())
        assert not any(r.asked and not r.running for r in self._requests.values())
