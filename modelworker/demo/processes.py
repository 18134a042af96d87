"""Real processes of the demo: started, waited for, and gone afterwards, whatever happens."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

START_TIMEOUT_S = 120.0  # importing torch from a cold disk takes a while
STOP_TIMEOUT_S = 10.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_with_parent() -> None:
    """In the child: SIGTERM when the demo is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class DemoFailed(Exception):
    """Something that the demo asserts is not so."""


class Process:
    """One child process; its log is a file of JSON lines."""

    def __init__(self, name: str, module: str, args: Sequence[str], log_dir: Path) -> None:
        self.name = name
        self._log = log_dir / f"{name}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", module, *args, "--log-format", "json"]
        command += ["--log-level", "info"]
        # no settings of the reader's, and no manager that keeps the daemon: the demo shows its own
        others = ("KVD_", "NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "FDSTORE")
        env = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        with self._log.open("wb") as out:
            # Its own process group: Ctrl-C reaches the demo alone, which then stops it in order.
            self._child = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
                env=env,
                preexec_fn=_end_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_for(self, event: str) -> dict[str, object]:
        """The first log record of that event. Raises DemoFailed with the log if it ends first."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            ended = self._child.poll() is not None
            for record in self._records():
                if record.get("event") == event:
                    return record
            if ended:
                break
            time.sleep(0.02)
        raise DemoFailed(f"{self.name} did not start; its log:\n{self._log.read_text()}")

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()

    def stop(self) -> None:
        """SIGTERM, twice if the first is not heeded: the second cuts short what the daemon waits
        for. Then SIGKILL."""
        for _ in range(2):
            if self._child.poll() is None:
                self._child.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(STOP_TIMEOUT_S)
        if self._child.poll() is None:
            self.kill()

    def _records(self) -> list[dict[str, object]]:
        records = []
        for line in self._log.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # progress and warnings are not records
            if isinstance(record, dict):
                records.append(record)
        return records


class Cluster:
    """The daemon, under its keeper, and its workers in one private folder. Use as a context
    manager."""

    def __init__(self, model: Path, pool_size: str, root: Path) -> None:
        self.socket_dir = root / "sockets"
        self._model, self._root = model, root
        self._pool_size = pool_size
        self._all: list[Process] = []

    def start_worker(self, name: str) -> Process:
        """Starts a worker; `url_of` waits for it."""
        args = ["serve", "--model", str(self._model), "--socket-dir", str(self.socket_dir)]
        args += ["--name", name, "--port", "0", "--threads", "1"]  # too small to gain from more
        return self._start(name, "modelworker", args)

    def _start(self, name: str, module: str, args: Sequence[str]) -> Process:
        with interrupts_deferred():  # a process that is started and not noted would be left behind
            process = Process(name, module, args, self._root)
            self._all.append(process)
        return process

    def __enter__(self) -> Cluster:
        args = ["serve", "--socket-dir", str(self.socket_dir), "--model", str(self._model)]
        try:
            daemon = self._start("kvd", "kvd", [*args, "--pool-size", self._pool_size])
            daemon.wait_for("daemon.ready")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        with interrupts_deferred():
            for process in reversed(self._all):  # workers first
                process.stop()


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block. For the main thread."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def url_of(worker: Process) -> str:
    """Where a worker answers, once it does."""
    return str(worker.wait_for("worker.ready")["url"])
