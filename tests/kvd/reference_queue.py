"""What age decides, said again as plain rules over one list."""

from __future__ import annotations

from dataclasses import dataclass

from kvd_shared.errors import UnknownRequest


@dataclass(eq=False)
class Request:
    number: int
    session: int
    running: bool = False
    demand: int = 0  # pages that were refused last
    asked: bool = False  # to yield
    seen_s: float | None = None  # since when it has been known to be asked
    overdue: bool = False


class ReferenceQueue:
    def __init__(self) -> None:
        self.requests: list[Request] = []  # oldest first
        self.next_number = 1
        self.notices: list[tuple[str, int, int]] = []  # (kind, request, tokens)

    def begin(self, session: int, count: int) -> int:
        first, self.next_number = self.next_number, self.next_number + count
        self.requests += [Request(first + i, session) for i in range(count)]
        return first

    def get(self, session: int, number: int) -> Request:
        for request in self.requests:
            if (request.number, request.session) == (number, session):
                return request
        raise UnknownRequest("")

    def end_session(self, session: int) -> None:
        self.requests = [r for r in self.requests if r.session != session]

    def yielded(self, request: Request) -> None:
        request.running, request.demand, request.asked = False, 0, False
        request.seen_s, request.overdue = None, False

    def reserved_from(self, one: Request | None) -> int:
        """Pages that others wait for and that `one` may not take."""
        return sum(r.demand for r in self.requests if r is not one and goes_before(r, one))

    def served(self, one: Request) -> None:
        one.running, one.demand = True, 0

    def refused(self, one: Request, wanted: int) -> None:
        """The first of the growing, else the oldest of all, has the youngest running one yield.
        Whoever was asked already is told again."""
        one.demand = wanted
        active = [r for r in self.requests if r.running or r.demand]
        growing = [r for r in active if r.running and r.demand]
        younger = [r for r in active if r.running and not r.asked and r.number > one.number]
        waited_for = [r for r in self.requests if r.asked and not r.overdue]
        if one.asked:
            self.notices.append(("yield", one.number, 0))
        elif one is [*growing, *active][0] and younger and not waited_for:
            younger[-1].asked = True
            self.notices.append(("yield", younger[-1].number, 0))

    def tick(self, now: float) -> None:
        for request in self.requests:
            if request.asked:
                request.seen_s = now if request.seen_s is None else request.seen_s
                request.overdue = now - request.seen_s >= 2.0


def goes_before(other: Request, one: Request | None) -> bool:
    """Growing ones before new ones, each by age; whoever has no number comes last."""
    if one is None or other.running != one.running:
        return one is None or other.running
    return other.number < one.number
