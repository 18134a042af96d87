"""A service manager for tests: what systemd does for a unit like this, in a thread.

    [Service]  Type=notify  NotifyAccess=main  Restart=always  RestartSec=0.05  WatchdogSec=…
               FileDescriptorStoreMax=…  RestartPreventExitStatus=…

    with FakeManager([sys.executable, "-m", "kvd", …], log_file) as manager:
        manager.wait_ready()
        manager.kill()                # SIGKILL; it is started again
        manager.wait_ready(2)         # the second READY=1

Written from systemd's documentation (sd_notify(3), sd_listen_fds(3), systemd.service(5)), and not
from kvd/keeper.py: shared code would hide shared mistakes. Of what the manager refuses it says
nothing to the service, as systemd does; a test finds it in `refused`.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

RESTART_S = 0.05
ABORT_S = 5.0  # TimeoutAbortSec=
STOP_S = 15.0  # TimeoutStopSec=
START_S = 30.0  # for tests that wait
SIGNS_OF_LIFE = {"READY", "WATCHDOG"}
# the shell knows its pid, keeps it over exec, and is quicker to start than anything else
_WITH_PID = 'export LISTEN_PID=$$ WATCHDOG_PID=$$ SYSTEMD_EXEC_PID=$$; exec "$0" "$@"'


class FakeManager:
    """One unit. Invariant: what the thread writes, tests read under `_changed`; `stored` has an fd
    of the manager's own for every entry."""

    def __init__(
        self,
        command: Sequence[str],
        log_file: Path,
        *,
        env: Mapping[str, str],  # of the service; nothing else is inherited
        max_fds: int = 256,  # FileDescriptorStoreMax=
        says_max_fds: bool = True,  # FDSTORE=, as systemd does since version 254
        watchdog_s: float | None = None,
        restart_prevent: Collection[int] = (78,),
        foreign: Mapping[str, int] | None = None,  # handed over at every start, by name: sockets
    ) -> None:
        self.command, self.log_file, self.env = list(command), log_file, dict(env)
        self.max_fds, self.says_max_fds, self.watchdog_s = max_fds, says_max_fds, watchdog_s
        self.restart_prevent, self.foreign = restart_prevent, dict(foreign or {})
        self.stored: list[tuple[str, int]] = []
        self.readies = 0  # READY=1, of all processes so far
        self.status = ""
        self.refused: list[str] = []  # what systemd would have logged
        self.heard: list[str] = []  # first lines of the messages that counted
        self.exits: list[int] = []  # as subprocess has them
        self.main: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._wanted = True
        self._keep_store = False
        self._ready = False
        self._deadline: float | None = None
        self._aborted = False
        self._folder = Path(tempfile.mkdtemp(prefix="manager"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self._folder / "notify"))
        self._socket.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="fake manager", daemon=True)

    # --- what a test does

    def __enter__(self) -> FakeManager:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)

    @property
    def pid(self) -> int:
        """MainPID."""
        assert self.main is not None
        return self.main.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """As `systemctl kill --kill-whom=main`."""
        os.kill(self.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """As `systemctl stop`: the store is emptied. Idempotent."""
        self._end(number, keep_store=False)
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self, command: Sequence[str] | None = None) -> None:
        """As `systemctl restart`: the store is kept."""
        self._end(signal.SIGTERM, keep_store=True)
        self.command = list(command or self.command)
        self._wanted = True
        self._thread = threading.Thread(target=self._run, name="fake manager", daemon=True)
        self._thread.start()

    def wait_ready(self, count: int = 1, timeout_s: float = START_S) -> None:
        """Until READY=1 has come that often."""
        with self._changed:
            there = self._changed.wait_for(
                lambda: self.readies >= count or not self._thread.is_alive(), timeout_s
            )
        said = self.log_file.read_text() if self.log_file.exists() else ""
        assert there and self.readies >= count, f"ready {self.readies} times of {count}:\n{said}"

    def wait_until(self, what: str, timeout_s: float = 10.0) -> None:
        """Until a message that begins with that line was heard."""
        with self._changed:
            assert self._changed.wait_for(lambda: what in self.heard, timeout_s), self.heard

    def wait_end(self, timeout_s: float = 10.0) -> int:
        """Until the unit has ended for good; the main process's exit code."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still runs after {timeout_s} s"
        return self.exits[-1]

    def names(self) -> list[str]:
        with self._changed:
            return sorted(name for name, _ in self.stored)

    def _end(self, number: int, *, keep_store: bool) -> None:
        self._wanted, self._keep_store = False, keep_store
        deadline = time.monotonic() + STOP_S
        while self._thread.is_alive():
            with suppress(ProcessLookupError):
                if self.main is not None and self.main.returncode is None:
                    os.kill(self.main.pid, number)
            self._thread.join(STOP_S if number == signal.SIGTERM else 0.05)
            if time.monotonic() > deadline:
                number = signal.SIGKILL

    # --- what the manager does, in its thread

    def _run(self) -> None:
        while self._wanted:
            self._start()
            self._watch()
            assert self.main is not None
            if self.main.returncode in self.restart_prevent:
                break
            time.sleep(RESTART_S)
        if not self._keep_store:
            with self._changed:
                for _, fd in self.stored:
                    os.close(fd)
                self.stored.clear()
        with self._changed:
            self._changed.notify_all()

    def _start(self) -> None:
        handed = [*self.foreign.items(), *self.stored]
        env = {**self.env, "NOTIFY_SOCKET": str(self._folder / "notify")}
        if handed:
            env |= {"LISTEN_FDS": str(len(handed)),
                    "LISTEN_FDNAMES": ":".join(name for name, _ in handed)}  # fmt: skip
        if self.watchdog_s is not None:
            env["WATCHDOG_USEC"] = str(int(self.watchdog_s * 1e6))
        if self.says_max_fds:
            env["FDSTORE"] = str(self.max_fds)
        fds = [fd for _, fd in handed]

        def place() -> None:
            high = [os.dup(fd) for fd in fds]
            while any(fd < 3 + len(fds) for fd in high):  # out of the way of the places
                high = [os.dup(fd) for fd in high]
            for to, fd in enumerate(high, 3):
                os.dup2(fd, to, inheritable=True)

        with self.log_file.open("ab") as log, self._changed:
            self._ready = self._aborted = False
            self._deadline = None
            self.main = subprocess.Popen(
                ["/bin/sh", "-c", _WITH_PID, *self.command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                close_fds=False,  # ours are close-on-exec
                preexec_fn=place,
            )

    def _watch(self) -> None:
        """Until the main process has ended."""
        assert self.main is not None
        pidfd = os.pidfd_open(self.main.pid)
        try:
            while True:
                late = None if self._deadline is None else self._deadline - time.monotonic()
                if late is not None and late <= 0:
                    self._overdue()
                    continue
                ready = select.select([self._socket.fileno(), pidfd], [], [], late)[0]
                self._read()
                if pidfd in ready:
                    self._read()
                    break
        finally:
            os.close(pidfd)
        with self._changed:
            self.exits.append(self.main.wait())
            self._changed.notify_all()

    def _overdue(self) -> None:
        self._abort(signal.SIGKILL if self._aborted else signal.SIGABRT)

    def _abort(self, number: int) -> None:
        assert self.main is not None
        self._aborted, self._deadline = True, time.monotonic() + ABORT_S
        os.kill(self.main.pid, number)

    def _read(self) -> None:
        while True:
            try:
                text, control, flags, _ = self._socket.recvmsg(4096, 4096, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            sender, fds = 0, []
            for level, kind, data in control:
                assert level == socket.SOL_SOCKET
                if kind == socket.SCM_CREDENTIALS:
                    sender = struct.unpack("3i", data)[0]
                elif kind == socket.SCM_RIGHTS:
                    fds = list(struct.unpack(f"{len(data) // 4}i", data))
            with self._changed:
                kept = self._heard(text.decode(), sender, fds, flags)
                self._changed.notify_all()
            for fd in fds:
                if fd not in kept:
                    os.close(fd)

    def _heard(self, text: str, sender: int, fds: list[int], flags: int) -> list[int]:
        """Acts on one message; which of its fds are kept."""
        assert self.main is not None
        lines = text.split("\n")
        if sender != self.main.pid or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            self.refused.append(f"from {sender}: {text}")
            return []
        said = dict(line.partition("=")[::2] for line in lines if line)
        if "BARRIER" in said:
            if len(said) != 1 or len(fds) != 1:
                self.refused.append(text)
            return []
        self.heard.append(lines[0])
        self.status = said.get("STATUS", self.status)
        if said.get("READY") == "1":
            self._ready = True
            self.readies += 1
        if said.get("WATCHDOG") == "trigger":
            self._abort(signal.SIGABRT)
        elif self._ready and self.watchdog_s and not self._aborted and SIGNS_OF_LIFE & said.keys():
            self._deadline = time.monotonic() + self.watchdog_s
        if said.get("FDSTOREREMOVE") == "1":
            self._remove(said.get("FDNAME", ""))
        elif said.get("FDSTORE") == "1":
            return self._store(said, fds, text)
        return []

    def _store(self, said: Mapping[str, str], fds: list[int], text: str) -> list[int]:
        name, kept = said.get("FDNAME", "stored"), []
        if len(name) > 255 or ":" in name or not name.isascii() or not name.isprintable():
            name = "stored"
        for fd in fds:
            if said.get("FDPOLL") != "0" and _hung_up(fd):
                self.refused.append(f"hung up: {text}")
            elif any(os.path.sameopenfile(fd, own) for _, own in self.stored):
                pass  # has it already
            elif len(self.stored) >= self.max_fds:
                self.refused.append(f"store is full: {text}")
            else:
                self.stored.append((name, fd))
                kept.append(fd)
        return kept

    def _remove(self, name: str) -> None:
        for own in [each for each in self.stored if each[0] == name]:
            self.stored.remove(own)
            os.close(own[1])


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))
