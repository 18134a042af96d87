"""Real workers in real processes, for tests.

`with running_worker(daemon, folder, tmp_path) as worker: ...` starts the command itself. Where many
are needed, `worker_nursery` imports torch once and forks a process for each.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.daemon import RunningDaemon, child_environment

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0

# PR_SET_PDEATHSIG (1): a test run that is killed leaves no worker behind.
_DIE_WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9)"
_SERVE = f"""\
{_DIE_WITH_PARENT}
import sys
from modelworker.cli import main
sys.exit(main())
"""
_NURSERY = f"""\
{_DIE_WITH_PARENT}
from tests.worker import raise_workers
raise_workers()
"""


class RunningWorker:
    """One `modelworker serve`. `process` is None where it is not this process's child; `killed`
    tells that the test has killed it."""

    def __init__(
        self, name: str, pid: int, log_file: Path, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.name = name
        self.killed = False
        self.pid = pid
        self.log_file = log_file
        self.process = process
        self.pidfd = os.pidfd_open(pid)

    @cached_property
    def url(self) -> str:
        """Waits until the worker serves. Raises when it ends before that."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (ready := self.logs("worker.ready")):
            if self.ended(0.01) or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the worker ended before it was ready:\n{self.text()}")
        url: str = ready[0]["url"]
        return url

    def ended(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended, after waiting for that a while."""
        poll = select.poll()  # select.select takes no fd over 1023
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def kill(self) -> None:
        """SIGKILL. Nothing if it has ended already."""
        self.killed = True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        assert self.ended(STOP_TIMEOUT_S)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit code, once the process has ended by itself."""
        assert self.ended(timeout_s), f"still running after {timeout_s} s:\n{self.text()}"
        if self.process is not None:
            return self.process.wait()
        code: int = self.logs("nursery.exit")[0]["code"]  # a forked one leaves a note
        return code

    def close(self) -> None:
        """Idempotent; nothing else may be called after it."""
        if self.pidfd < 0:
            return
        self.kill()
        os.close(self.pidfd)
        self.pidfd = -1
        if self.process is not None:
            self.process.wait()

    def logs(self, event: str | None = None) -> list[dict[str, Any]]:
        """What has been logged so far; only lines of one event, if given."""
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [line for line in lines if event in (None, line["event"])]

    def text(self) -> str:
        """Everything that was printed, tracebacks included, up to the last whole line."""
        printed = self.log_file.read_bytes() if self.log_file.exists() else b""
        return printed[: printed.rfind(b"\n") + 1].decode()


def serve_arguments(socket_dir: Path, folder: Path, name: str, *options: str) -> list[str]:
    """Of a worker on a free port, with one thread: the tensors are tiny."""
    arguments = ["serve", "--model", str(folder), "--socket-dir", str(socket_dir), "--name", name]
    arguments += ["--served-model-name", "tiny", "--port", "0", "--threads", "1"]
    return [*arguments, "--log-format", "json", *options]


@contextmanager
def running_worker(
    daemon: RunningDaemon, folder: Path, tmp_path: Path, *options: str, name: str = "worker"
) -> Iterator[RunningWorker]:
    """A worker of the daemon, ready; `options` are further ones of the command line."""
    worker = start_worker(daemon.socket_dir, folder, tmp_path, *options, name=name)
    try:
        _ = worker.url
        yield worker
    finally:
        worker.close()


def start_worker(
    socket_dir: Path, folder: Path, tmp_path: Path, *options: str, name: str = "worker"
) -> RunningWorker:
    """The same without waiting; the caller closes it."""
    log_file = tmp_path / f"{name}.log"
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _SERVE,
                *serve_arguments(socket_dir, folder, name, *options),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=child_environment(),
        )
    return RunningWorker(name, process.pid, log_file, process)


class WorkerNursery:
    """Forks workers from one process that has imported what they need. They are real processes
    with sessions of their own; only the seconds of the imports are saved."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, tmp_path: Path) -> None:
        self._process = process
        self._folder = folder
        self._tmp_path = tmp_path
        self._workers: list[RunningWorker] = []

    def start(
        self,
        daemon: RunningDaemon,
        *options: str,
        name: str = "worker",
        folder: Path | None = None,
    ) -> RunningWorker:
        """A worker of the daemon, not yet ready; the nursery closes it. Another `folder` than the
        nursery's may be given."""
        log_file = self._tmp_path / f"{name}-{len(self._workers)}.log"
        arguments = serve_arguments(daemon.socket_dir, folder or self._folder, name, *options)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, str(log_file)]).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery has ended"
        self._workers.append(RunningWorker(name, int(answer), log_file))
        return self._workers[-1]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(STOP_TIMEOUT_S)


@contextmanager
def worker_nursery(folder: Path, tmp_path: Path) -> Iterator[WorkerNursery]:
    """For workers of a model folder; those still running are killed on leaving."""
    process = subprocess.Popen(
        [sys.executable, "-c", _NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
    )
    nursery = WorkerNursery(process, folder, tmp_path)
    try:
        yield nursery
    finally:
        nursery.close()


def raise_workers() -> None:
    """The nursery's own process: a line of arguments and log file in, a pid out."""
    import modelworker.serve  # noqa: F401 - with it everything that a worker needs

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        arguments, log_file = json.loads(line)
        pid = os.fork()
        if not pid:
            _grow_up(arguments, log_file)
        print(pid, flush=True)


def _grow_up(arguments: list[str], log_file: str) -> None:
    """The forked child: a worker, and nothing after it."""
    import ctypes
    import traceback

    from modelworker.cli import main

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        print(json.dumps({"event": "nursery.exit", "code": code}))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
