"""Every operation of the cache core, by the pool's size and by the fan-out.

The prompts of one length are the same at every size, and each is used several times: what is
compared is the work, not how much of the tree is in the processor's caches. A pool is full of
documents of 64 pages, but for the room that the timed operations take.
"""

from __future__ import annotations

from itertools import chain

from tests.benchmarks.harness import Report, Row
from tests.benchmarks.timing import Timing
from tests.benchmarks.tree_suite import COLD_ROUNDS, MakeGarden, Suite
from tests.benchmarks.workload import Garden, Tokens, filled, settle

POOLS = (10_000, 100_000, 1_000_000)  # pages
PROMPTS = tuple(COLD_ROUNDS)  # tokens
SIZE_LIMITS = (1.5, 1.2)  # 1M pages over 10k: target, aim

FAN_OUTS = (10, 100_000)  # children below one page
FAN_POOL, FAN_PAGES, FAN_PROMPT = 1_000_000, 8, 1024  # pages; pages a child; tokens
FAN_LIMITS = (3.0, 1.5)  # 100k children over 10: target, aim

BATCHES = 8
MORE_BATCHES = 8  # where a ratio is over its target: noise only ever adds

BySize = dict[int, Timing]


def sizes(report: Report) -> None:
    """Rows: each operation at 1M pages over the same at 10k pages."""
    report.say(f"filling a pool of {POOLS[-1]:,} pages")
    makes = {pages: _built(pages) for pages in POOLS[:-1]}
    makes[POOLS[-1]] = _kept(filled(POOLS[-1], 0))
    for n in PROMPTS:
        suites = {pages: Suite(n, make) for pages, make in makes.items()}
        report.say(f"tree operations with prompts of {n:,} tokens")
        for name, by_size in _measured(suites, SIZE_LIMITS[0]).items():
            label = f"{name}, {_tokens(n)}: 1M over 10k pages"
            report.add(_row(label, by_size, n, SIZE_LIMITS, "pages"))


def fan_outs(report: Report) -> None:
    """Rows: each operation below a page with 100k children over the same with 10."""
    few, many = FAN_OUTS
    report.say(f"a page with {many:,} children")
    makes: dict[int, MakeGarden] = {
        few: lambda room: _branching(few),
        many: _kept(_branching(many)),
    }
    suites = {children: Suite(FAN_PROMPT, make) for children, make in makes.items()}
    for name, by_size in _measured(suites, FAN_LIMITS[0]).items():
        label = f"{name}, {_tokens(FAN_PROMPT)}: fan-out 100k over 10"
        report.add(_row(label, by_size, FAN_PROMPT, FAN_LIMITS, "fan_out"))


def _measured(suites: dict[int, Suite], target: float) -> dict[str, BySize]:
    """The timings by operation and size, taken in turn."""
    for batch in range(BATCHES + MORE_BATCHES):
        if batch >= BATCHES and all(_ratio(t) <= target for t in _timings(suites).values()):
            break
        for suite in suites.values():
            settle()
            suite.batch(seed=batch)
    return _timings(suites)


def _timings(suites: dict[int, Suite]) -> dict[str, BySize]:
    by_size = {size: suite.timings() for size, suite in suites.items()}
    names = dict.fromkeys(chain.from_iterable(by_size.values()))
    return {name: {size: timings[name] for size, timings in by_size.items()} for name in names}


def _ratio(by_size: BySize) -> float:
    return by_size[max(by_size)].p50_us / by_size[min(by_size)].p50_us


def _built(num_pages: int) -> MakeGarden:
    """A small pool is built anew each time."""
    return lambda room: filled(num_pages, room)


def _kept(garden: Garden) -> MakeGarden:
    """A large one makes room among its documents."""

    def make(room: int) -> Garden:
        garden.make_room(room)
        return garden

    return make


def _branching(children: int) -> Garden:
    garden = Garden(FAN_POOL, head=Tokens(0).pages(1))
    garden.plant(children, FAN_PAGES)
    return garden


def _row(name: str, by_size: BySize, tokens: int, limits: tuple[float, float], size: str) -> Row:
    small, large = by_size[min(by_size)], by_size[max(by_size)]
    ratio = round(_ratio(by_size), 3)
    return Row(
        name=name,
        value=ratio,
        unit="x",
        target=limits[0],
        aim=limits[1],
        details={
            "pages": max(by_size) if size == "pages" else FAN_POOL,
            "tokens": tokens,
            **large.to_json(),
            "baseline": f"the same at {size} = {min(by_size)}",
            "baseline_us": round(small.p50_us, 3),
            "ratio": ratio,
            f"by_{size}": {str(key): timing.to_json() for key, timing in by_size.items()},
        },
    )


def _tokens(count: int) -> str:
    return f"{count // 1024}k tokens"
