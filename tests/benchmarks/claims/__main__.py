"""python -m tests.benchmarks.claims [--trace FILE] [--requests N] [--seeds N] [--out DIR]"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from kvd_shared import exit_codes
from modelworker.cli import SHIPPED_MODEL
from tests.benchmarks.claims import experiments, mode_table, modes
from tests.benchmarks.claims.conversations import CONTEXT, SCALE, Request, made_up, read_trace
from tests.benchmarks.claims.experiments import Facts
from tests.benchmarks.claims.kernel_cost import contiguous_saves
from tests.benchmarks.claims.plot import draw
from tests.benchmarks.claims.rows import rows, saved_pages
from tests.benchmarks.harness import OUT, Report
from tests.benchmarks.machine import ROOT

FEWEST_REQUESTS = 50
TRACE = ROOT.parent / "shared" / "data" / "conversation_trace.jsonl"


def main() -> int:
    options = _options()
    try:
        trace, source = _trace(options.trace)
    except (OSError, ValueError) as e:
        print(f"bench-claims: {e}", file=sys.stderr)
        return exit_codes.USAGE
    configuration = {
        "model": SHIPPED_MODEL.name,
        "lengths": source,
        "scale": SCALE,
        "left_out_as_too_long": 1 - sum(request.fits for request in trace) / len(trace),
        "num_slots": modes.NUM_SLOTS,
        "page_size": modes.PAGE_SIZE,
        "requests": options.requests,
        "seeds": options.seeds,
    }
    report = Report("claims", configuration, ("torch", "numpy", "pyzmq", "matplotlib"))
    print(
        f"Lengths: {source}, divided by {SCALE}; {configuration['left_out_as_too_long']:.0%} of "
        f"the requests are longer than the context and left out. Model: {SHIPPED_MODEL.name}."
    )
    facts = _measure(report, trace, options.requests, options.seeds)
    for row in rows(facts):
        report.add(row)
    by_mode = mode_table.medians(facts.outcomes)
    print(f"Medians over {options.seeds} seeds; at once, waste and memory: while requests wait.\n")
    print(mode_table.as_text(by_mode), end="\n\n")
    report.extra["modes"] = by_mode
    report.extra["runs"] = {
        name: [asdict(outcome) | {"answers": _lines(outcome.answers)} for outcome in outcomes]
        for name, outcomes in facts.outcomes.items()
    }
    report.extra["system_prompts"] = {
        tokens: [[asdict(s) | {"answers": _lines(s.answers)} for s in pair] for pair in pairs]
        for tokens, pairs in facts.system.items()
    }
    status = report.finish(options.out)
    _draw(facts, options.out / "claims.png")
    return status


def _measure(report: Report, trace: list[Request], num_requests: int, num_seeds: int) -> Facts:
    facts = Facts()
    report.say("contiguous attention against paged")
    whole_contexts = modes.NUM_SLOTS // CONTEXT
    facts.contiguous_saves = contiguous_saves(whole_contexts, CONTEXT // 4, modes.PAGE_SIZE)
    report.say("a daemon and its workers for the pages, others for the reservations")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="claims")))
        paged = stack.enter_context(experiments.paged_world(folder / "paged"))
        reserving = stack.enter_context(experiments.reserving_world(folder / "reserving"))
        experiments.warm_up((paged, reserving))
        for seed in range(1, num_seeds + 1):
            worlds = paged, reserving
            experiments.conversations(facts, trace, num_requests, seed, worlds, report.say)
            experiments.system_prompts(facts, seed, paged, report.say)
        for daemon, _ in (paged, reserving):
            daemon.check()
    return facts


def _trace(given: Path | None) -> tuple[list[Request], str]:
    """The requests and what they are."""
    path = given or TRACE
    if given is None and not path.exists():
        return made_up(), f"drawn from the trace's quantiles, since {path.name} is not there"
    return read_trace(path), f"of {path.name}"


def _lines(answers: list[list[int]]) -> list[str]:
    return [" ".join(map(str, answer)) for answer in answers]


def _draw(facts: Facts, path: Path) -> None:
    usages = {name: [o.memory for o in outcomes] for name, outcomes in facts.outcomes.items()}
    try:
        draw(path, usages, saved_pages(facts))
    except ImportError as e:
        print(f"no picture: {e}")
    else:
        print(f"picture: {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-claims", description="what paging gives")
    add = parser.add_argument
    add("--trace", type=Path, metavar="FILE", help="default: the trace if it is there")
    add("--requests", type=int, default=100, metavar="N", help="of a run (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="samples of the trace")
    add("--out", type=Path, default=OUT, metavar="DIR", help="for claims.json and claims.png")
    options = parser.parse_args()
    if options.requests < FEWEST_REQUESTS or options.seeds < 1:
        parser.error(
            f"--requests {options.requests} --seeds {options.seeds}: fewer than {FEWEST_REQUESTS} "
            "requests never fill the memory, and one seed is the least"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
