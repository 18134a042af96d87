"""`make bench-trace`: what eviction policies find again on a trace of requests.

python -m tests.benchmarks.trace [--trace FILE] [--policy NAME] [--capacity BLOCKS]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from kvd.policies import POLICIES
from kvd_shared import exit_codes
from tests.benchmarks.harness import OUT, Report, Row
from tests.benchmarks.machine import ROOT
from tests.benchmarks.trace.clairvoyant import clairvoyant
from tests.benchmarks.trace.plot import draw
from tests.benchmarks.trace.reader import TraceError, read_trace
from tests.benchmarks.trace.replay import Replayed, replay
from tests.benchmarks.trace.request import Trace

TRACE = ROOT.parent / "shared" / "data" / "conversation_trace.jsonl"
CAPACITIES = (1000, 5859, 10000, 30000)
WORST_TO_LRU = 0.99  # of what LRU finds
# What `density` is to find on this very trace, which has so many requests, by capacity.
GOALS, GOALS_REQUESTS = {1000: 0.080, 5859: 0.180, 10000: 0.230, 30000: 0.330}, 12_031
MOST_CPU = 2.0  # times what LRU takes
BEST = "clairvoyant"


def main() -> int:
    options = _options()
    try:
        trace = read_trace(options.trace)
    except TraceError as e:
        print(f"bench-trace: {e}", file=sys.stderr)
        return exit_codes.USAGE
    policies = ["lru", *(name for name in options.policies if name != "lru")]
    report = Report(
        "trace",
        {
            "trace": options.trace.name,
            "requests": len(trace),
            "blocks": sum(len(request.blocks) for request in trace),
            "policies": policies,
            "capacities": options.capacities,
            "repeats": options.repeats,
        },
        ("numpy", "matplotlib"),
    )
    shares: dict[str, list[float]] = {name: [] for name in (*policies, BEST)}
    saved: dict[str, list[float]] = {name: [] for name in policies}
    for capacity in options.capacities:
        _measure(report, trace, policies, capacity, options.repeats, shares, saved)
    report.extra["shares"] = {"capacities": options.capacities, **shares}
    report.extra["work_saved"] = {"capacities": options.capacities, **saved}
    _print("Share of all prompts' blocks that was found:", options.capacities, shares)
    _print("Share of the work of computing all prompts that was saved:", options.capacities, saved)
    try:
        draw(options.out / "trace.png", options.capacities, shares)
    except ImportError:
        print("No picture: matplotlib is not installed.")
    return report.finish(options.out)


def _measure(
    report: Report,
    trace: Trace,
    policies: list[str],
    capacity: int,
    repeats: int,
    shares: dict[str, list[float]],
    saved: dict[str, list[float]],
) -> None:
    """One capacity: the policies take turns, so that a busy machine is busy for all."""
    runs: dict[str, list[Replayed]] = {name: [] for name in policies}
    for turn in range(repeats):
        for name in policies:
            report.say(f"{capacity} blocks, {name}, run {turn + 1} of {repeats}")
            runs[name].append(replay(trace, name, capacity))
    lru = runs["lru"][0]
    best = clairvoyant(trace, capacity) / lru.asked
    shares[BEST].append(best)
    lru_s = statistics.median(run.cpu_s for run in runs["lru"])
    for name in policies:
        first, other = runs[name][0], name != "lru"
        shares[name].append(first.share)
        saved[name].append(first.saved)
        times = [run.cpu_s for run in runs[name]]
        report.add(
            Row(
                name=f"{name}, {capacity} blocks, share found",
                value=first.share,
                unit="",
                target=_target(trace, name, capacity, lru.share) if other else None,
                aim=(lru.share + best) / 2 if other else None,
                higher_is_better=True,
                details={
                    "lru": lru.share,
                    BEST: best,
                    "found": first.found,
                    "asked": first.asked,
                    "left_out_as_too_long": first.left_out,
                    "work_saved": first.saved,
                    "cpu_s": times,
                    "cpu_s_median": statistics.median(times),
                },
            )
        )
        if other:
            ratio = statistics.median(times) / lru_s
            report.add(
                Row(
                    name=f"{name}, {capacity} blocks, CPU time over LRU's",
                    value=ratio,
                    unit="x",
                    target=MOST_CPU,
                    details={"spread": max(times) / min(times) - 1},
                )
            )


def _target(trace: Trace, policy: str, capacity: int, lru_share: float) -> float:
    known = policy == "density" and len(trace) == GOALS_REQUESTS
    goal = GOALS.get(capacity, 0.0) if known else 0.0
    return max(goal, WORST_TO_LRU * lru_share)


def _print(title: str, capacities: list[int], shares: dict[str, list[float]]) -> None:
    print(f"{title}\n")
    print("blocks".ljust(14) + "".join(f"{capacity:>9,}" for capacity in capacities))
    for name, each in shares.items():
        print(name.ljust(14) + "".join(f"{share:9.4f}" for share in each))
    print()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trace", description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE, metavar="FILE")
    parser.add_argument(
        "--policy",
        dest="policies",
        type=_policies,
        default=list(POLICIES),
        metavar="NAME[,NAME]",
        help=f"of {', '.join(POLICIES)}; LRU always runs as well. Default: all",
    )
    parser.add_argument(
        "--capacity",
        dest="capacities",
        type=_capacities,
        default=list(CAPACITIES),
        metavar="BLOCKS[,BLOCKS]",
        help="pages of the pool, each a block of 512 tokens",
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each replay, for its CPU time")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: must be at least 1")
    return options


def _policies(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(
                f"no policy {name!r}: must be one of {', '.join(POLICIES)}"
            )
    return list(dict.fromkeys(names))


def _capacities(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > 1 << 22:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be whole numbers of blocks from 1 to {1 << 22}, with commas between"
        )
    return sorted(set(sizes))


if __name__ == "__main__":
    sys.exit(main())
