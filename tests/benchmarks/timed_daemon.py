"""`python -m tests.benchmarks.timed_daemon CONFIG OUT`: `kvd serve`, with its loop's turns timed.

A turn is what the loop's thread does between two waits for events: all callbacks that were ready.
OUT gets one line for every turn of more than 0.1 ms of CPU time, when it ends:
`end_s (CLOCK_MONOTONIC) cpu_ms op,op,…`: the requests that were taken up in it, and with a ~ those
of which it did a slice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from typing import Any, TextIO

from kvd import rpc_server, server
from kvd.cli import main as kvd_main
from kvd.serving_loop import ServingSelector

SHORTEST_MS = 0.1


class TimedSelector(ServingSelector):
    """Invariant: `_began` is the thread's CPU time when it last stopped waiting; `ops` are the
    requests since then."""

    def __init__(self, out: TextIO, ops: list[str]) -> None:
        super().__init__()
        self._out = out
        self._ops = ops
        self._began = time.thread_time()

    def wait(self, timeout_ms: int | None) -> list[tuple[int, int]]:
        cpu_ms = (time.thread_time() - self._began) * 1e3
        if cpu_ms > SHORTEST_MS:
            self._out.write(f"{time.monotonic():.6f} {cpu_ms:.4f} {','.join(self._ops) or '-'}\n")
        self._ops.clear()
        ready = super().wait(timeout_ms)
        self._began = time.thread_time()
        return ready


def note_operations(ops: list[str]) -> None:
    """Let the RPC server's requests be named in `ops` as they are taken up, and those that are
    done in slices with each slice."""
    perform = vars(rpc_server)["perform"]

    def noted(daemon: Any, attachment: Any, op: Any, *rest: Any) -> Any:
        ops.append(str(op))
        result = perform(daemon, attachment, op, *rest)
        return _slices(f"~{op}", result, ops) if isinstance(result, Generator) else result

    vars(rpc_server)["perform"] = noted


def _slices(
    name: str, job: Generator[None, None, Any], ops: list[str]
) -> Generator[None, None, Any]:
    while True:
        ops.append(name)
        try:
            next(job)
        except StopIteration as e:
            return e.value
        yield


def main() -> int:
    config, path = sys.argv[1:]
    with open(path, "w", buffering=1) as out:  # by lines: whoever reads it need not wait
        ops: list[str] = []
        note_operations(ops)
        vars(server)["ServingSelector"] = lambda: TimedSelector(out, ops)
        return kvd_main(["serve", "--no-keeper", "--config", config])


if __name__ == "__main__":
    sys.exit(main())
