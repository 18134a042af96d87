"""A function of a test in a process of its own, and how the two talk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

CHILD_TIMEOUT_S = 20.0


class Child:
    """`run(socket_dir, connection to the test, n)` in a process of its own."""

    def __init__(self, run: Callable[[Path, Connection, int], None], where: Path, n: int) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self.process: SpawnProcess = multiprocessing.get_context("spawn").Process(
            target=run, args=(where, theirs, n), daemon=True
        )
        self.process.start()
        theirs.close()

    def says(self) -> Any:
        """What it sends next."""
        assert self._connection.poll(CHILD_TIMEOUT_S), "the child process says nothing"
        return self._connection.recv()

    def go_on(self) -> None:
        self._connection.send(None)

    def end(self) -> None:
        """Let it go to its end."""
        self.go_on()
        self.process.join(CHILD_TIMEOUT_S)
        assert self.process.exitcode == 0


@contextmanager
def child(run: Callable[[Path, Connection, int], None], where: Path, n: int) -> Iterator[Child]:
    started = Child(run, where, n)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.join()
