"""Starts light workers by the hundred: one process imports what they need and forks each.

A fork takes milliseconds where a start takes a quarter of a second of a core; the workers are
processes with sessions of their own all the same.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from tests.chaos import history
from tests.chaos.light_worker import LightWorker
from tests.chaos.work import Options
from tests.daemon import child_environment

# PR_SET_PDEATHSIG (1): a run that is killed leaves no process behind.
_NURSERY = """\
import ctypes; ctypes.CDLL(None).prctl(1, 9)
from tests.chaos.nursery import raise_workers
raise_workers()
"""
ENDING_S = 20.0


class Child:
    """One forked process, by its pidfd. `killed_s`: when it was killed by us (CLOCK_MONOTONIC)."""

    def __init__(self, name: str, pid: int) -> None:
        self.name, self.pid = name, pid
        self.pidfd = os.pidfd_open(pid)
        self.started_s = time.monotonic()
        self.killed_s: float | None = None
        self.expected_to_end = False  # it was told to

    def signal(self, number: int) -> None:
        """Nothing if it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        self.expected_to_end = True
        self.killed_s = time.monotonic()
        self.signal(signal.SIGKILL)

    def ended(self, timeout_s: float = 0.0) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def close(self) -> None:
        """Killed, if it still runs. Idempotent."""
        if self.pidfd >= 0:
            if not self.ended():
                self.kill()
                self.ended(ENDING_S)
            os.close(self.pidfd)
            self.pidfd = -1


class Nursery:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.children: list[Child] = []

    def start(self, options: Options) -> Child:
        """A worker of its own process; it attaches at once."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(options)).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the nursery of light workers has ended")
        child = Child(options.name, int(answer))
        self.children.append(child)
        return child

    def forget(self, child: Child) -> None:
        child.close()
        self.children.remove(child)

    def close(self) -> None:
        for child in self.children:
            child.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(ENDING_S)


@contextmanager
def nursery() -> Iterator[Nursery]:
    """Workers that still run are killed on leaving."""
    process = subprocess.Popen(
        [sys.executable, "-c", _NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
    )
    found = Nursery(process)
    try:
        yield found
    finally:
        found.close()


def raise_workers() -> None:
    """The nursery's own process: a line of options in, a pid out."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        options = Options.from_json(json.loads(line))
        pid = os.fork()
        if not pid:
            _live(options)
        print(pid, flush=True)


def _live(options: Options) -> None:
    """The forked child: a worker, and nothing after it. That it ends by an error is a violation."""
    import ctypes

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(0)
        os.dup2(2, 1)  # the nursery's stdout is for pids
        LightWorker(options).run()
        code = 0
    except BaseException:
        note = {"t": time.monotonic(), "worker": options.name, "what": "a worker crashed"}
        note["text"] = traceback.format_exc()
        file = history.violations_file(Path(options.folder), options.name)
        with file.open("a") as out:
            out.write(json.dumps(note) + "\n")
    finally:
        os._exit(code)
