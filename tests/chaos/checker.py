"""Whether the histories of a run's workers can all be true of one pool.

For each page there is a set of spans in which it was surely a worker's: from the reply that gave it
to the request that let it go, or to the kill. Two spans of one page may overlap only if both are
reading, or belong to one worker, and if both mean the same use of the page (one generation).
"""

from __future__ import annotations

import math
from collections import Counter as Count
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tests.chaos.history import Kind, Records

MAX_FINDINGS = 50  # told; all are counted


class Span(NamedTuple):
    """One worker's time with one page. Times are CLOCK_MONOTONIC, seconds."""

    start_s: float
    end_s: float
    pool: int
    ref: int
    writes: bool
    worker: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong with the histories: `count` overlaps, of which `told` describes the first."""

    count: int
    told: list[str]
    spans: int


def check(histories: Mapping[str, Records], ended_s: Mapping[str, float]) -> Findings:
    """Every pair of spans that cannot be. `ended_s`: when a worker was killed, or the daemon with
    its pool; a history without one goes to its last record."""
    by_page: dict[tuple[int, int], list[Span]] = defaultdict(list)
    num_spans = 0
    for worker, records in histories.items():
        for span in spans(worker, records, ended_s.get(worker)):
            by_page[span.pool, span.ref & 0xFFFF_FFFF].append(span)
            num_spans += 1
    told: list[str] = []
    count = 0
    for of_page in by_page.values():
        for finding in _overlaps(of_page):
            count += 1
            if len(told) < MAX_FINDINGS:
                told.append(finding)
    return Findings(count, told, num_spans)


def spans(worker: str, records: Records, killed_s: float | None = None) -> Iterable[Span]:
    """From one worker's records, in their order."""
    open_spans: dict[int, tuple[float, bool]] = {}
    closed: list[Span] = []  # of the session
    pool, last_s = 0, -math.inf

    def close(refs: Iterable[int], end_s: float) -> None:
        for ref in refs:
            start_s, writes = open_spans.pop(ref)
            closed.append(Span(start_s, end_s, pool, ref, writes, worker))

    for last_s, ref, kind, _ in records.tolist():
        if kind in (Kind.OWN, Kind.READ):
            close({ref} & open_spans.keys(), last_s)  # publishing was refused
            open_spans[ref] = last_s, kind == Kind.OWN
        elif kind == Kind.SEALED:
            open_spans.setdefault(ref, (last_s, True))
            close([ref], last_s)
            open_spans[ref] = last_s, False
        elif kind == Kind.LET_GO:
            close({ref} & open_spans.keys(), last_s)
        elif kind == Kind.FENCED:
            close(list(open_spans), last_s)
            closed = [one for span in closed if (one := _unfenced(span, ref / 1e9))]
        elif kind in (Kind.LOST, Kind.ATTACHED):
            close(list(open_spans), last_s)
            if kind == Kind.ATTACHED:
                yield from closed
                closed, pool = [], ref
    # it may have lived, and noted something, a moment after the clock was read for its kill
    close(list(open_spans), last_s if killed_s is None else max(last_s, killed_s))
    yield from closed


def _unfenced(span: Span, until_s: float) -> Span | None:
    """What a worker only read was surely as it was until it last saw that it is not fenced. Its own
    pages stay its own."""
    if span.writes or span.end_s <= until_s:
        return span
    return span._replace(end_s=until_s) if span.start_s < until_s else None


def _overlaps(of_page: list[Span]) -> Iterable[str]:
    """A sweep in the order of starts; only spans that have not ended are compared."""
    going: list[Span] = []
    for span in sorted(of_page):
        going = [other for other in going if other.end_s > span.start_s]
        for other in going:
            if span.ref != other.ref:
                yield _told("two uses of one page at once", other, span)
            elif span.worker != other.worker and (span.writes or other.writes):
                yield _told("a page was another's to write", other, span)
        going.append(span)


def _told(what: str, one: Span, other: Span) -> str:
    page = one.ref & 0xFFFF_FFFF
    each = " and ".join(
        f"{s.worker} {'wrote' if s.writes else 'read'} generation {s.ref >> 32} from "
        f"{s.start_s:.6f} to {s.end_s:.6f}"
        for s in (one, other)
    )
    return f"{what}: page {page}: {each}"


def known_pages(histories: Iterable[Records]) -> Count[int]:
    """By number of the path: how many of its pages some worker knows to be published."""
    known: Count[int] = Count()
    for records in histories:
        of_paths = records[records["kind"] == Kind.KNOWN]
        for number, pages in zip(of_paths["ref"].tolist(), of_paths["extra"].tolist(), strict=True):
            known[number] = max(known[number], pages)
    return known
