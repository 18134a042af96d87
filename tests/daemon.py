"""A real daemon in a real process, for tests: `with running_daemon(tmp_path) as daemon: ...`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvd_shared import verbs
from kvd_shared.client import KvdClient

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0

# PR_SET_PDEATHSIG (1): a test run that is killed leaves no daemon behind. A keeper passes it on.
_SERVE = """\
import ctypes, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM if "--max-restarts" in sys.argv else signal.SIGKILL)
from kvd.cli import main
sys.exit(main())
"""
# what a service manager of the test run itself would say
_MANAGERS_OWN = ("NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "FDSTORE", "KEEPER_PID")


class RunningDaemon:
    """One `kvd serve` in its own socket directory; `process` is the current one: the daemon, or
    its keeper."""

    process: subprocess.Popen[bytes]

    def __init__(
        self, socket_dir: Path, config: Path, log_file: Path, max_restarts: int | None = None
    ) -> None:
        """`max_restarts`: what a keeper is told; None: no keeper."""
        self.socket_dir = socket_dir
        self.config = config
        self.log_file = log_file
        self.max_restarts = max_restarts

    @property
    def pid(self) -> int:
        """The daemon's own, whoever keeps it: of the one that got ready last."""
        return int(self.logs("daemon.ready")[-1]["pid"])

    def start(self) -> None:
        """Start a (further) process and wait until it serves. Raises when it ends before that."""
        starts = len(self.logs("daemon.ready"))
        self.process = start_process(self.config, self.log_file, self.max_restarts)
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(self.logs("daemon.ready")) == starts:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(
                    f"kvd ended with {self.process.returncode} before it was ready:\n{self.text()}"
                )
            time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit code, once the process has ended by itself."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, to a keeper and to its daemon. Nothing if it has ended already."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)
        if self.max_restarts is not None:
            for pid in daemons_of(self.config):
                os.kill(pid, signal.SIGKILL)
            eventually(lambda: not daemons_of(self.config), STOP_TIMEOUT_S)

    def logs(self, event: str | None = None) -> list[dict[str, Any]]:
        """What has been logged (by all processes so far); only lines of one event, if given."""
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [line for line in lines if event in (None, line["event"])]

    def text(self) -> str:
        """Everything that was printed, tracebacks included, up to the last whole line."""
        printed = self.log_file.read_bytes() if self.log_file.exists() else b""
        return printed[: printed.rfind(b"\n") + 1].decode()

    def attach(self, name: str = "worker", role: str = "worker", **options: Any) -> KvdClient:
        """A client of this process."""
        return KvdClient.attach(self.socket_dir, name=name, role=role, **options)

    def ask(self, call: verbs.Call[Any]) -> Any:
        """The answer to one admin's question, asked by a session of its own."""
        with self.attach("asking", "admin") as admin:
            return admin.call(call)

    def counts(self) -> dict[str, int]:
        """How many pages are in which state."""
        counts: dict[str, int] = self.ask(verbs.pages())["counts"]
        return counts

    def sessions(self) -> dict[str, dict[str, Any]]:
        """The attached sessions by name, without the one that asks."""
        listed = self.ask(verbs.sessions())["sessions"]
        return {s["name"]: s for s in listed if s["name"] != "asking"}

    def check(self) -> None:
        """Asserts that the pool's invariants hold and that no request met a bug."""
        audit = self.ask(verbs.audit())
        assert audit["ok"], audit["finding"]
        assert not self.logs("rpc.internal_error"), self.text()
        assert "Traceback" not in self.text(), self.text()


@contextmanager
def running_daemon(
    tmp_path: Path,
    *,
    num_pages: int = 64,
    page_size: int = 16,
    num_layers: int = 1,
    num_kv_heads: int = 1,
    head_dim: int = 8,
    kv_dtype: str = "auto",
    model: Path | None = None,
    drain_timeout_s: float = 10.0,
    max_sessions: int = 1024,
    settings: str = "",
    daemon_settings: str = "",
    max_restarts: int | None = None,
) -> Iterator[RunningDaemon]:
    """A daemon that serves one pool, "default", of an explicit layout, or of a `model` folder's.

    `settings`: further keys of the pool, then tables of it, as lines of TOML; `daemon_settings`:
    further keys of the daemon, likewise. `max_restarts`: under
    a keeper that is told so; None: without one.

    Its sockets are in a directory of its own with a short path; its configuration and its log are
    in `tmp_path`. On leaving, the process is ended and the directory removed, whatever happened.
    """
    socket_dir = Path(tempfile.mkdtemp(prefix="kvd"))
    layout = f"[pool.layout]\n{num_layers = }\n{num_kv_heads = }\n{head_dim = }\n"
    source = f"model = {json.dumps(str(model))}\n{settings}" if model else settings + layout
    config = tmp_path / f"{socket_dir.name}.toml"
    config.write_text(
        f'[daemon]\nsocket_dir = "{socket_dir}"\nlog_format = "json"\n{drain_timeout_s = }\n'
        f"{max_sessions = }\n{daemon_settings}"
        f'[[pool]]\nname = "default"\nsize = "{num_pages} pages"\n{page_size = }\n'
        f'kv_dtype = "{kv_dtype}"\n{source}'
    )
    daemon = RunningDaemon(socket_dir, config, tmp_path / f"{socket_dir.name}.log", max_restarts)
    try:
        daemon.start()
        yield daemon
    finally:
        if hasattr(daemon, "process"):
            daemon.kill()
        shutil.rmtree(socket_dir, ignore_errors=True)


def start_process(
    config: Path, log_file: Path, max_restarts: int | None = None
) -> subprocess.Popen[bytes]:
    """`kvd serve --config …` as a process, without waiting; prints into `log_file`."""
    kept = ["--no-keeper"] if max_restarts is None else ["--max-restarts", str(max_restarts)]
    with log_file.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _SERVE, "serve", "--config", str(config), *kept],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=child_environment(),
        )


def daemons_of(config: Path) -> list[int]:
    """Living processes that have that configuration on their command line: daemons and keepers."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and os.fsencode(config) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def child_environment() -> dict[str, str]:
    """This process's environment for a Python child: the same import path, no kvd settings."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("KVD_", *_MANAGERS_OWN))}
    return own | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def eventually(what: Callable[[], Any], timeout_s: float = 5.0) -> Any:
    """The first true value of `what()`; fails when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"still {value!r} after {timeout_s} s"
        time.sleep(0.02)
    return value
