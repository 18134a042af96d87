"""Random sequences of operations against the reference model, as many as you have time for.

    python -m tests.kvd.long_run --sequences 1000000 --seed 1 [--processes 2] [--operations 25]

The answers are compared at every operation, the whole states at every eighth and at the end of each
sequence. A failure is made as short as leaving out operations makes it, and printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from multiprocessing import get_context

from tests.kvd.random_workers import Step, play, random_steps

CHECK_EVERY = 8
BATCH = 500  # sequences between two lines of progress


def sequence_of(seed: int, operations: int) -> list[Step]:
    return random_steps(random.Random(seed), operations)


def failure_of(seed: int, steps: list[Step]) -> str | None:
    try:
        play(seed, steps, CHECK_EVERY, strict=False)
    except Exception:
        return traceback.format_exc()
    return None


def shortened(seed: int, steps: list[Step]) -> list[Step]:
    """Leave out operations while it still fails."""
    at = 0
    while at < len(steps):
        fewer = steps[:at] + steps[at + 1 :]
        if failure_of(seed, fewer):
            steps = fewer
        else:
            at += 1
    return steps


def run_batch(work: tuple[int, int, int]) -> tuple[int, str]:
    """Returns how many operations it did, and what failed."""
    first, count, operations = work
    done = 0
    for seed in range(first, first + count):
        steps = sequence_of(seed, operations)
        try:
            done += play(seed, steps, CHECK_EVERY, strict=False)
        except Exception:
            short = shortened(seed, steps)
            return done, f"seed {seed}: play({seed}, {short})\n{failure_of(seed, short)}"
    return done, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=25, help="steps of a sequence")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    last = options.seed + options.sequences
    works = [
        (first, min(BATCH, last - first), options.operations)
        for first in range(options.seed, last, BATCH)
    ]
    began, sequences, operations = time.monotonic(), 0, 0
    with get_context("spawn").Pool(options.processes) as pool:
        for work, (done, failed) in zip(works, pool.imap(run_batch, works), strict=True):
            if failed:
                print(failed, flush=True)
                return 1
            sequences, operations = sequences + work[1], operations + done
            seconds = time.monotonic() - began
            rate = sequences / seconds
            print(
                f"{sequences} sequences, {operations} operations, {seconds:.0f} s, {rate:.0f}/s",
                flush=True,
            )
    print("the core did what the model does")
    return 0


if __name__ == "__main__":
    sys.exit(main())
