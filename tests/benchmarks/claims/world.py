"""A daemon and its benchmark workers: real processes, started once and used for all runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks.claims.plan import Outcome, Plan
from tests.daemon import RunningDaemon, child_environment, running_daemon

STOP_TIMEOUT_S = 10.0


class BenchWorker:
    """One `tests.benchmarks.claims.worker`. It ends when its standard input does."""

    def __init__(self, daemon: RunningDaemon, name: str, log_file: Path) -> None:
        self._log_file = log_file
        arguments = ["-m", "tests.benchmarks.claims.worker", str(daemon.socket_dir), name]
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=child_environment(),
            )

    def begin(self, plan: Plan) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(plan.to_json() + "\n")
        self._process.stdin.flush()

    def outcome(self) -> Outcome:
        """Waits for the end of the plan. Raises RuntimeError when the process ends before it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended in its run:\n{self._log_file.read_text()[-4000:]}")
        return Outcome.from_json(line)

    def run(self, plan: Plan) -> Outcome:
        self.begin(plan)
        return self.outcome()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def running_world(
    folder: Path, model: Path, num_pages: int, page_size: int, names: Sequence[str]
) -> Iterator[tuple[RunningDaemon, list[BenchWorker]]]:
    """A daemon of one pool for the model and a worker for each name; all gone afterwards."""
    with ExitStack() as stack:
        daemon = stack.enter_context(
            running_daemon(folder, model=model, num_pages=num_pages, page_size=page_size)
        )
        workers = []
        for name in names:
            workers.append(BenchWorker(daemon, name, folder / f"{name}.log"))
            stack.callback(workers[-1].close)
        yield daemon, workers
