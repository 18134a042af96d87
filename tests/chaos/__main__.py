"""`python -m tests.chaos [SCENARIO…]`: what is done to a running kvd on purpose, and whether it
keeps its promises.

Each scenario prints how far it is and a table, and writes build/chaos/SCENARIO.json. The exit
status is 1 where a promise was not kept. Without a name all are played, which takes more than an
hour; docs/reliability.md says how long each takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

from tests.benchmarks.harness import Report, Row
from tests.benchmarks.machine import ROOT
from tests.chaos import clock, daemon_kills, fence, fuzz, overload, soak, stop, workers
from tests.chaos.watch import Broken

OUT = ROOT / "build" / "chaos"
PACKAGES = ("numpy", "pyzmq", "msgpack")
SCENARIOS: dict[str, Any] = {
    module.NAME: module
    for module in (workers, daemon_kills, stop, fence, fuzz, soak, overload, clock)
}


def main() -> int:
    args = _parser().parse_args()
    unknown = set(args.scenarios) - SCENARIOS.keys()
    if unknown:
        print(f"no scenario {', '.join(sorted(unknown))}; there are: {', '.join(SCENARIOS)}")
        return 2
    code = 0
    for name in args.scenarios or SCENARIOS:
        code |= _play(name, args)
    return code


def _play(name: str, args: argparse.Namespace) -> int:
    module = SCENARIOS[name]
    plan = module.Plan()
    known = {field.name for field in fields(plan)}
    given = {k: v for k, v in vars(args).items() if k in known and v is not None}
    plan = replace(plan, **given)
    if name == fuzz.NAME:
        plan = _resumed(plan, args.go_on)
    report = Report(name, asdict(plan) | {"progress": None}, PACKAGES)
    report.say(f"{name}: {plan}")
    try:
        module.play(report, plan)
    except Broken as e:
        report.say(f"broken: {e}")
        report.extra["broken"] = str(e)
        report.add(Row(name="promises broken for good", value=1, unit="", target=0))
    return report.finish(OUT)


def _resumed(plan: fuzz.Plan, go_on: bool) -> fuzz.Plan:
    """A fuzz run says after each block how far it is, and can go on from there."""
    OUT.mkdir(parents=True, exist_ok=True)
    progress = OUT / f"fuzz-{plan.seed}.progress"
    first = json.loads(progress.read_text())["next"] if go_on and progress.exists() else 0
    return replace(plan, progress=progress, first_block=first)


def _parser() -> argparse.ArgumentParser:
    number: Callable[[str], int] = lambda text: int(text.replace("_", "").replace(",", ""))  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("scenarios", nargs="*", help=", ".join(SCENARIOS))
    parser.add_argument("--seed", type=int, help="of everything that is drawn (default: 1)")
    parser.add_argument("--kills", type=number, help="of workers, or of the daemon")
    parser.add_argument("--seconds", type=float, help="of soak, of each overload, of clock")
    parser.add_argument("--messages", type=number, help="of fuzz")
    parser.add_argument("--go-on", action="store_true", help="fuzz: behind the last finished block")
    parser.add_argument("--stopped-s", type=float, help="of stop and fence")
    parser.add_argument("--blows-a-minute", type=float,
                        help="of soak, half of them kills (default: 6)")  # fmt: skip
    parser.add_argument("--daemon-kills", action=argparse.BooleanOptionalAction, default=None,
                        help="soak: a third of the kills meets the daemon (default)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
