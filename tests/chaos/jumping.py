"""`python -m tests.chaos.jumping OUT ARGUMENTS…`: `kvd ARGUMENTS…` under a wall clock that jumps.

`time.time`, `time.time_ns` and `time.clock_gettime` of the real-time clock are off by up to two
days, by another span at every reading; OUT gets a line for each reading.
"""

from __future__ import annotations

import ctypes
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

DAYS_S = 2 * 86_400


def jump(path: str) -> None:
    out = open(path, "a", buffering=1)  # noqa: SIM115 - to the process's end
    rng = random.Random(1)
    real_ns = time.time_ns
    gettime, gettime_ns = time.clock_gettime, time.clock_gettime_ns

    def jumped_ns() -> int:
        out.write("1\n")
        return real_ns() + rng.randrange(-DAYS_S, DAYS_S) * 1_000_000_000

    def of(clock: Callable[[int], Any], scale: float) -> Callable[[int], Any]:
        wall = time.CLOCK_REALTIME
        return lambda which: jumped_ns() * scale if which == wall else clock(which)

    vars(time)["time_ns"] = jumped_ns
    vars(time)["time"] = lambda: jumped_ns() / 1e9
    vars(time)["clock_gettime"] = of(gettime, 1e-9)
    vars(time)["clock_gettime_ns"] = of(gettime_ns, 1)


def main() -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with the run that started it
    jump(sys.argv[1])
    from kvd.cli import main as kvd_main  # what it imports finds the jumping clock

    return kvd_main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
