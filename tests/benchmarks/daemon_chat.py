"""A chat turn in process: match, hold, allocate or evict, publish, free; and what is found."""

from __future__ import annotations

from kvd_shared.layout import pages_needed
from kvd_shared.refs import REF_BYTES
from tests.benchmarks.chat import ROOMY, ROOMY_HIT_RATE, TIGHT, Turn, exact_lru_hit_rate, turns
from tests.benchmarks.harness import Report, Row
from tests.benchmarks.timing import Stopwatch
from tests.benchmarks.workload import NAMESPACE, PAGE_TOKEN_BYTES, Garden, settle

RUNS = 6
TARGET_US, AIM_US = 35.0, 15.0
EXACT = 0.0005  # hit rates that agree to three digits and a half


def chats(report: Report) -> None:
    """Rows: microseconds a turn, and the share of prompt tokens found, in two pools."""
    report.say("chat: what an exact LRU finds")
    every = list(turns())
    pools = {"roomy": ROOMY, "tight": TIGHT}
    expected = {name: exact_lru_hit_rate(every, size) for name, size in pools.items()}
    assert abs(expected["roomy"] - ROOMY_HIT_RATE) < EXACT, "this is not the peers' workload"
    watches = {name: Stopwatch() for name in pools}
    recorded = {name: Stopwatch() for name in pools}
    found: dict[str, float] = {}
    for run in range(RUNS):
        report.say(f"chat: {len(every)} turns in each pool, run {run + 1} of {RUNS}")
        for name, size in pools.items():
            watches[name].batch()
            found[name] = _run(Garden(size), every, watches[name])
            recorded[name].batch()
            _run(Garden(size, recorded=True), every, recorded[name])
    for name, size in pools.items():
        what = f"chat turn in process, {name} pool ({size // 1000}k pages)"
        report.add(_row(what, size, watches[name], TARGET_US, AIM_US))
        report.add(_row(f"{what}, recorded for a restart", size, recorded[name], None, None))
        report.add(
            Row(
                name=f"chat hit rate, {name} pool: exact LRU's ({expected[name]:.4f})",
                value=round(found[name], 4),
                unit="",
                target=round(expected[name] - EXACT, 4),
                higher_is_better=True,
                details={"pages": size, "exact_lru": round(expected[name], 4)},
            )
        )


def _row(name: str, size: int, watch: Stopwatch, target: float | None, aim: float | None) -> Row:
    timing = watch.timing()
    return Row(
        name=name,
        value=round(timing.p50_us, 2),
        unit="us",
        target=target,
        aim=aim,
        details={"pages": size, "tokens": None, **timing.to_json(),
                 "baseline": None, "ratio": None},
    )  # fmt: skip


def _run(garden: Garden, every: list[Turn], watch: Stopwatch) -> float:
    settle()
    for turn in every:
        watch.time(chat_turn, garden, turn)
    counters = garden.cache.counters
    return counters.tokens_matched / counters.tokens_asked


def chat_turn(garden: Garden, turn: Turn) -> None:
    """What a worker asks for one turn, without computing anything."""
    cache, session = garden.cache, garden.session
    count = pages_needed(len(turn.whole), PAGE_TOKEN_BYTES)
    held = cache.acquire(session, NAMESPACE, turn.prompt, count, None, garden.now)
    known, full = held.num_matched_pages, len(turn.whole) // PAGE_TOKEN_BYTES
    new = held.refs[known * REF_BYTES : full * REF_BYTES]
    after = int.from_bytes(held.refs[: known * REF_BYTES][-REF_BYTES:], "little") if known else None
    tokens = turn.whole[known * PAGE_TOKEN_BYTES : full * PAGE_TOKEN_BYTES]
    cache.publish(session, NAMESPACE, tokens, new, after, garden.now)
    cache.free(session, held.refs, garden.now)
