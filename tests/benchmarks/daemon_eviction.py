"""Evicting 1 page and 1000 pages from a full pool of a million, with few leaves and with many."""

from __future__ import annotations

from tests.benchmarks.harness import Report, Row
from tests.benchmarks.timing import Stopwatch
from tests.benchmarks.workload import Garden, filled, settle

POOL = 1_000_000  # pages
DOCUMENT_PAGES = {64: (None, None), 8: (5.0, 250.0)}  # pages a leaf: targets for 1 and 1000, us
AIMS = {1: 2.0, 1000: 120.0}
BATCHES = 40
ROUNDS = {1: 40, 1000: 4}  # a batch


def evictions(report: Report) -> None:
    """Rows: microseconds until the pages are out of the tree and on the free list."""
    for document_pages, targets in DOCUMENT_PAGES.items():
        leaves = POOL // document_pages
        report.say(f"a pool of {POOL:,} pages full with {leaves:,} leaves")
        garden = filled(POOL, 0, document_pages)
        settle()
        watches = {count: Stopwatch() for count in ROUNDS}
        for _ in range(BATCHES):
            for count, rounds in ROUNDS.items():
                watches[count].batch()
                for _ in range(rounds):
                    _evict(garden, watches[count], count)
        for (count, watch), target in zip(watches.items(), targets, strict=True):
            timing = watch.timing()
            report.add(
                Row(
                    name=f"evict {count} of 1M pages in {leaves // 100 / 10:g}k leaves",
                    value=round(timing.p50_us, 3),
                    unit="us",
                    target=target,
                    aim=AIMS[count] if target else None,
                    details={
                        "pages": POOL,
                        "tokens": None,
                        **timing.to_json(),
                        "baseline": None,
                        "ratio": None,
                        "leaves": leaves,
                    },
                )
            )


def _evict(garden: Garden, watch: Stopwatch, count: int) -> None:
    free, cached = len(garden.cache.free_list), garden.cache.tree.num_pages
    watch.time(garden.evict, count)
    gone = len(garden.cache.free_list) - free, cached - garden.cache.tree.num_pages
    assert gone == (count, count), f"asked for {count} pages, (free, tree) changed by {gone}"
