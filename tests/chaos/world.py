"""Daemons for the chaos runs: plain, timed, watched or kept alive by a keeper."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.content import LAYOUT
from tests.daemon import START_TIMEOUT_S, RunningDaemon, child_environment

# PR_SET_PDEATHSIG (1): a run that is killed leaves no daemon behind. A keeper passes it on.
PLAIN = (
    "-c",
    "import ctypes, sys; ctypes.CDLL(None).prctl(1, 15 if '--max-restarts' in sys.argv else 9); "
    "from kvd.cli import main; sys.exit(main())",
)
ANY_NUMBER = 1_000_000  # of restarts
POLL_S = 0.002


class ChaosDaemon(RunningDaemon):
    """One `kvd serve`, started as `python PROGRAM… serve …`. `served_by` is the process that
    serves: the child of `process` where that is a keeper."""

    def __init__(
        self,
        socket_dir: Path,
        config: Path,
        log_file: Path,
        program: Sequence[str] = PLAIN,
        *,
        keeper: bool = False,
    ) -> None:
        super().__init__(socket_dir, config, log_file, ANY_NUMBER if keeper else None)
        self.served_by = 0
        kept = ["--max-restarts", str(ANY_NUMBER)] if keeper else ["--no-keeper"]
        self._command = [sys.executable, *program, "serve", "--config", str(config), *kept]
        self._read = 0  # bytes of the log

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
        self.until_ready()

    def until_ready(self) -> float:
        """Wait for the next process that serves; CLOCK_MONOTONIC when that was seen in the log."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            text = self.log_file.read_bytes() if self.log_file.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            new, self._read = whole[self._read :], len(whole)
            now = time.monotonic()
            if b'"daemon.ready"' in new:
                self.served_by = self.logs("daemon.ready")[-1]["pid"]
                return now
            if self.process.poll() is not None or now > deadline:
                raise RuntimeError(f"kvd did not get ready:\n{self.text()[-4000:]}")
            time.sleep(POLL_S)


def _environment() -> dict[str, str]:
    """With cached bytecode, as an installed kvd has it: compiling its sources at each start takes
    longer than all of the rest."""
    env = child_environment()
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return env


@contextmanager
def chaos_daemon(
    folder: Path,
    *,
    num_pages: int,
    page_size: int = LAYOUT.page_size,
    program: Sequence[str] = PLAIN,
    keeper: bool = False,
    daemon_settings: str = "",
    pool_settings: str = "",
) -> Iterator[ChaosDaemon]:
    """A daemon with one pool of the light workers' layout. Its sockets are in a directory of its
    own; on leaving, it is ended and they are removed."""
    socket_dir = Path(tempfile.mkdtemp(prefix="kvd"))
    config = folder / f"{socket_dir.name}.toml"
    config.write_text(
        f'[daemon]\nsocket_dir = "{socket_dir}"\nlog_format = "json"\ndrain_timeout_s = 10.0\n'
        f'{daemon_settings}[[pool]]\nname = "default"\nsize = "{num_pages} pages"\n'
        f'{page_size = }\nkv_dtype = "{LAYOUT.dtype}"\n{pool_settings}'
        f"[pool.layout]\nnum_layers = {LAYOUT.num_layers}\nnum_kv_heads = {LAYOUT.num_kv_heads}\n"
        f"head_dim = {LAYOUT.head_dim}\n"
    )
    log_file = folder / f"{socket_dir.name}.log"
    daemon = ChaosDaemon(socket_dir, config, log_file, program, keeper=keeper)
    try:
        daemon.start()
        yield daemon
    finally:
        if hasattr(daemon, "process"):
            daemon.kill()
        shutil.rmtree(socket_dir, ignore_errors=True)
