"""`python -m tests.chaos.timed OUT ARGUMENTS…`: `kvd ARGUMENTS…`, with its service times taken.

For each request OUT gets three float64: when it was answered (CLOCK_MONOTONIC), the CPU time of the
loop's thread from the beginning of the turn in which it was read to its answer, in µs, and that of
its handling alone. The first is what it waits for inside kvd on an idle machine: what else the turn
did before it (a dead session's pages taken back, other requests) is in it.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import selectors
import signal
import sys
import time
from array import array
from typing import Any

from kvd import rpc_server
from kvd.cli import main as kvd_main

FLUSH_SAMPLES = 300


class TurnSelector(selectors.DefaultSelector):
    """Invariant: `began` is the thread's CPU time when it last stopped waiting."""

    began = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout)
        TurnSelector.began = time.thread_time()
        return ready


class TurnLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(TurnSelector())


def take_times(path: str) -> None:
    samples = array("d")
    out = open(path, "wb", buffering=0)  # noqa: SIM115 - to the process's end
    server: Any = rpc_server.RpcServer
    handle = server._handle

    def timed(self: Any, *message: Any) -> None:
        start = time.thread_time()
        handle(self, *message)
        end = time.thread_time()
        samples.extend((time.monotonic(), (end - TurnSelector.began) * 1e6, (end - start) * 1e6))
        if len(samples) >= FLUSH_SAMPLES * 3:
            flush()

    def flush() -> None:
        out.write(samples.tobytes())
        del samples[:]

    server._handle = timed
    atexit.register(flush)


def main() -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with the run that started it
    take_times(sys.argv[1])
    asyncio.set_event_loop_policy(TurnLoops())
    return kvd_main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
