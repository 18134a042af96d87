"""`kvd serve` where there is no service manager: this process starts the daemon as its child, keeps
the daemon's memory for it, and starts it again when it crashes.

It speaks the manager's side of sd_notify and of the fd store, so that the daemon cannot tell it
from systemd but by KEEPER_PID. It never maps the memory and reads no configuration: small enough
to outlive whatever kills the daemon. Nothing heavy may be imported here.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from kvd.keeper_log import say
from kvd.kept_fds import MAX_CONTROL, MAX_FDS, MAX_MESSAGE, KeptFds, received, sender_pid
from kvd_shared import exit_codes

KEEPER_VARIABLE = "KEEPER_PID"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT,
             signal.SIGUSR1, signal.SIGUSR2)  # fmt: skip
FINAL = (exit_codes.OK, exit_codes.USAGE, exit_codes.IN_USE, exit_codes.BAD_CONFIG,
         exit_codes.INTERRUPTED)  # fmt: skip
DEFAULT_RESTARTS = 10
RESTARTS_WITHIN_S = 60.0
PAUSE_S = 0.5  # before a restart of a daemon that did not get ready
WATCHDOG_S = 30.0  # of silence, once it was ready: SIGABRT
ABORT_S = 10.0  # to die of SIGABRT, which may write a core file; then SIGKILL


class Keeper:
    """Invariants: `_child` is a process that was not waited for, or 0; its number is nobody else's
    until it was. Signals are acted upon in the loop alone, one after the other."""

    def __init__(self, command: Sequence[str], max_restarts: int, watchdog_s: float) -> None:
        self._command, self._max_restarts, self._watchdog_s = (
            list(command),
            max_restarts,
            watchdog_s,
        )
        self._kept = KeptFds()
        self._notes = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notes.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        # abstract: nothing to clean up after a SIGKILL; who may send is told by the kernel's pid
        name = f"kvd-keeper/{os.getpid()}/{os.urandom(8).hex()}"
        self._notes.bind("\0" + name)
        self._address = "@" + name
        self._wake, self._signals = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for channel in (self._notes, self._wake, self._signals):
            channel.setblocking(False)
        self._selector.register(self._notes, selectors.EVENT_READ, self._read_notes)
        self._selector.register(self._wake, selectors.EVENT_READ, self._read_signals)
        self._child = 0
        self._ready = self._was_ready = False  # this child; any child so far
        self._next_s: float | None = None  # when something is due: restart, SIGABRT or SIGKILL
        self._aborted = False
        self._sent: set[int] = set()  # signals that were passed on to this child
        self._ends: deque[float] = deque()  # the latest crashes
        self._code: int | None = None  # to end with

    def run(self) -> int:
        """Until the daemon has ended for good; returns its exit status (128 + n: by signal n)."""
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        for number in (*PASSED_ON, signal.SIGCHLD):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish goes on to the child
                signal.signal(number, lambda *_: None)
        self._start()
        while self._code is None:
            due = self._next_s
            wait_s = None if due is None else max(0.0, due - time.monotonic())
            for key, _ in self._selector.select(wait_s):
                key.data()
            if due is not None and due == self._next_s and time.monotonic() >= due:
                self._late()
        return self._code

    # --- the child

    def _start(self) -> None:
        self._ready = self._aborted = False
        self._next_s = None
        self._sent.clear()
        env = {k: v for k, v in os.environ.items() if not k.startswith("LISTEN_")}
        env |= {"NOTIFY_SOCKET": self._address, KEEPER_VARIABLE: str(os.getpid()),
                "FDSTORE": str(MAX_FDS)}  # fmt: skip
        self._child = os.fork()
        if self._child:
            return
        try:  # the child, from here on
            # A terminal's Ctrl-C must come once, from the keeper: a second one ends the drain.
            os.setsid()
            pid = str(os.getpid())
            env |= {"WATCHDOG_USEC": str(int(self._watchdog_s * 1e6)), "WATCHDOG_PID": pid}
            env |= self._kept.hand_over(pid)
            os.execve(self._command[0], self._command, env)
        except BaseException as e:
            say("keeper.start_failed", command=self._command[0], error=str(e))
        finally:
            os._exit(exit_codes.RUNTIME_ERROR)

    def _ended(self, status: int) -> None:
        """The daemon is gone, and reaped."""
        pid, self._child = self._child, 0
        code = os.waitstatus_to_exitcode(status)
        passed = 128 - code if code < 0 else code
        now = time.monotonic()
        self._ends.append(now)
        while self._ends[0] < now - RESTARTS_WITHIN_S:
            self._ends.popleft()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if {signal.SIGTERM, signal.SIGINT, -code} & self._sent or code in FINAL:
            self._code = passed
        elif code > 0 and not self._was_ready:
            self._code = passed  # it never served, and said why
        elif len(self._ends) > self._max_restarts:
            say("keeper.gave_up", pid=pid, ended=how, restarts=self._max_restarts,
                within_s=RESTARTS_WITHIN_S, effect="its memory is freed")  # fmt: skip
            self._code = passed
        else:
            say("keeper.restarts", pid=pid, ended=how, kept_fds=len(self._kept))
            self._next_s = now if self._ready else now + PAUSE_S

    def _late(self) -> None:
        """Nothing came until `_next_s`."""
        if not self._child:
            self._start()
        elif self._aborted:
            self._next_s = None
            os.kill(self._child, signal.SIGKILL)
        else:
            self._abort("it was silent for too long")

    def _abort(self, why: str) -> None:
        if self._aborted:
            return
        say("keeper.watchdog", pid=self._child, why=why, watchdog_s=self._watchdog_s)
        self._aborted, self._next_s = True, time.monotonic() + ABORT_S
        os.kill(self._child, signal.SIGABRT)

    # --- what comes in

    def _read_signals(self) -> None:
        for number in self._wake.recv(4096):
            if number == signal.SIGCHLD:
                self._reap()
            elif self._child:
                self._sent.add(number)
                os.kill(self._child, number)
            elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                self._code = 128 + number  # between two daemons: there will be no further one

    def _reap(self) -> None:
        """All that ended: as a container's first process this one inherits orphans."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._child:
                    self._read_notes()  # what it said before
                    self._ended(ended[1])

    def _read_notes(self) -> None:
        with suppress(BlockingIOError):
            while True:
                text, control, flags, _ = self._notes.recvmsg(
                    MAX_MESSAGE, MAX_CONTROL, socket.MSG_CMSG_CLOEXEC
                )
                fds = received(control)
                try:
                    if sender_pid(control) == self._child and not flags & socket.MSG_TRUNC:
                        self._heard(dict(x.partition("=")[::2] for x in _lines(text)), fds)
                finally:
                    for fd in fds:
                        os.close(fd)  # kept are duplicates

    def _heard(self, said: dict[str, str], fds: list[int]) -> None:
        """BARRIER=1 needs nothing more: its fd is closed with the others, after all before it."""
        if said.get("FDSTORE") == "1":
            self._kept.store(said.get("FDNAME", "stored"), fds)
        if said.get("FDSTOREREMOVE") == "1":
            self._kept.remove(said.get("FDNAME", "stored"))
        if said.get("READY") == "1":
            self._ready = self._was_ready = True
        if said.get("WATCHDOG") == "trigger":
            self._abort("it asked for it")
        elif not self._aborted and {"READY", "WATCHDOG"} & said.keys():
            self._next_s = time.monotonic() + self._watchdog_s


def _lines(text: bytes) -> list[str]:
    return text.decode(errors="replace").splitlines()


def keep(
    arguments: Sequence[str], max_restarts: int = DEFAULT_RESTARTS, watchdog_s: float = WATCHDOG_S
) -> int:
    """`kvd ARGUMENTS` as this process's child, kept and restarted; returns its exit status."""
    # -P: the working directory is no place to import from
    return Keeper([sys.executable, "-P", "-m", "kvd", *arguments], max_restarts, watchdog_s).run()
