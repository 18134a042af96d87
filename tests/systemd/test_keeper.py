"""The keeper by itself, with small scripts in the daemon's place."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import child_environment, eventually

_KEEP = """\
import ctypes, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # which a shell's background jobs ignore
from kvd.keeper import Keeper
restarts, watchdog_s, *command = sys.argv[1:]
sys.exit(Keeper(command, int(restarts), float(watchdog_s)).run())
"""
# a service: says what it got, and is ready
_SERVICE = """\
import json, os, signal, sys, time
from kvd.fd_store import received_fds
from kvd_shared.notify import NotifySocket
got = received_fds(os.environ)
seen = {name: [os.fstat(fd).st_ino for fd in fds] for name, fds in got.items()}
manager = NotifySocket.from_environment(os.environ)
opened = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
def say(event, **keys):
    print(json.dumps({"event": event, "pid": os.getpid(), **keys}), flush=True)
say("up", fds=seen, open=opened, sid=os.getsid(0), parent=os.getppid(), env=sorted(os.environ))
"""
READY = _SERVICE + "manager.ready('here')\n"


class Kept:
    """A keeper with such a service, and what both have printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def lines(self, event: str) -> list[dict[str, Any]]:
        text = self.log.read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def up(self, count: int = 1) -> dict[str, Any]:
        """The first line of the service's start of that number."""
        return eventually(lambda: self.lines("up")[count - 1 :], 15)[0]

    def stored(self, count: int = 1) -> None:
        """Waits until so many services have stored what they have."""
        eventually(lambda: len(self.lines("stored")) >= count, 15)

    def num_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait(self) -> int:
        return self.process.wait(15)


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    """`keep(service)`: a keeper; on leaving, it and its service are gone."""
    started: list[Kept] = []

    def start(service: str, restarts: int = 100, watchdog_s: float = 60, **options: Any) -> Kept:
        log = tmp_path / f"{len(started)}.log"
        command = [sys.executable, "-c", service, str(log)]
        with log.open("wb") as out:
            options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, **options}
            process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-c", _KEEP, str(restarts), str(watchdog_s), *command],
                env=child_environment(),
                **options,
            )
        started.append(Kept(process, log))
        return started[-1]

    yield start
    for kept in started:
        kept.process.kill()
        kept.process.wait()
        for line in kept.lines("up"):
            if is_alive(line["pid"]):
                os.kill(line["pid"], signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """And no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


STORE = (
    _SERVICE
    + """\
if not got:
    for name in ("meta.a", "pool.a.0", "pool.a.1"):
        manager.store(name, os.memfd_create(name))
    manager.store("gone", os.memfd_create("gone"))
    manager.remove("gone")
else:
    for name, fds in got.items():
        manager.store(name, fds[0])  # is there already
manager.barrier()
manager.ready("here")
say("stored")
signal.pause()
"""
)


def test_fds_come_back_to_every_successor(keep: Callable[..., Kept]) -> None:
    kept = keep(STORE)
    assert kept.up()["fds"] == {}
    pids, seen = [], None
    for count in range(1, 21):
        start = kept.up(count)
        kept.stored(count)
        if count == 2:
            seen, fds = start["fds"], kept.num_fds()
            assert sorted(seen) == ["meta.a", "pool.a.0", "pool.a.1"]
            assert start["open"][:6] == [0, 1, 2, 3, 4, 5]
        if count > 2:
            assert start["fds"] == seen
            assert kept.num_fds() <= fds
        assert start["parent"] == kept.process.pid
        assert not {"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"} & set(start["env"])
        pids.append(start["pid"])
        os.kill(start["pid"], signal.SIGKILL)
    last = kept.up(21)["pid"]
    children = Path(f"/proc/{kept.process.pid}/task/{kept.process.pid}/children")
    assert children.read_text().split() == [str(last)]  # and no zombie
    said = kept.lines("keeper.restarts")
    assert [(line["pid"], line["ended"], line["kept_fds"]) for line in said] == [
        (pid, "SIGKILL", 3) for pid in pids
    ]


SHUFFLE = (
    _SERVICE
    + """\
def new(name):
    fd = os.memfd_create(name)
    manager.store(name, fd)
    return [os.fstat(fd).st_ino]
kept = {name: new(name) for name in "abcdefgh"}
for name in "ab":
    manager.remove(name)
    manager.barrier()
    del kept[name]
kept |= {name: new(name) for name in "ij"}
manager.barrier()
manager.ready("here")
say("kept", fds=kept)
signal.pause()
"""
)


def test_each_comes_back_under_its_own_name(keep: Callable[..., Kept]) -> None:
    """Also when numbers in the keeper are those of others' places in the service."""
    kept = keep(SHUFFLE)
    (stored,) = eventually(lambda: kept.lines("kept"), 15)
    os.kill(kept.up()["pid"], signal.SIGKILL)
    assert kept.up(2)["fds"] == stored["fds"]


def test_it_is_small(keep: Callable[..., Kept]) -> None:
    kept = keep(STORE)
    kept.stored()
    status = Path(f"/proc/{kept.process.pid}/status").read_text()
    resident_kb = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kb < 20_000
    script = (
        "import sys, kvd.keeper; print({'numpy', 'zmq', 'structlog', 'asyncio'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=child_environment(), capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("code", [0, 2, 5, 78, 130])
def test_an_end_for_good_is_passed_on(code: int, keep: Callable[..., Kept]) -> None:
    """Ended as asked, usage, another daemon has the sockets, bad configuration, Ctrl-C."""
    kept = keep(READY + f"sys.exit({code})")
    assert kept.wait() == code
    assert len(kept.lines("up")) == 1


def test_a_service_that_never_served_is_not_tried_again(keep: Callable[..., Kept]) -> None:
    """Too little memory, for instance: whoever started it wants to see that, once."""
    kept = keep(_SERVICE + "sys.exit(1)")
    assert kept.wait() == 1
    assert len(kept.lines("up")) == 1


@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit(1)", 1), ("os.kill(os.getpid(), signal.SIGKILL)", 137), ("os.abort()", 134)],
)
def test_a_crash_loop_is_given_up(end: str, status: int, keep: Callable[..., Kept]) -> None:
    kept = keep(READY + end, restarts=3)
    assert kept.wait() == status
    assert len(kept.lines("up")) == 4
    (gave_up,) = kept.lines("keeper.gave_up")
    assert (gave_up["restarts"], gave_up["within_s"]) == (3, 60.0)
    assert gave_up["effect"] == "its memory is freed"


HEED = (
    READY
    + """\
def heard(number, _):
    say("signal", number=number)
    if number in (signal.SIGTERM, signal.SIGINT):
        time.sleep(0.5)
        sys.exit(7)
for number in (1, 2, 10, 15):
    signal.signal(number, heard)
say("listening")
while True:
    signal.pause()
"""
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_is_passed_on_and_waited_for(
    number: int, keep: Callable[..., Kept]
) -> None:
    kept = keep(HEED)
    eventually(lambda: kept.lines("listening"))
    kept.process.send_signal(number)
    assert kept.wait() == 7  # and no restart, whatever it ends with
    assert [line["number"] for line in kept.lines("signal")] == [number]
    assert len(kept.lines("up")) == 1


def heard(kept: Kept, count: int) -> bool:
    return len(kept.lines("signal")) >= count


def test_other_signals_are_passed_on_and_it_goes_on(keep: Callable[..., Kept]) -> None:
    kept = keep(HEED)
    eventually(lambda: kept.lines("listening"))
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGHUP):
        sent = len(kept.lines("signal")) + 1
        kept.process.send_signal(number)
        eventually(partial(heard, kept, sent))
    assert [line["number"] for line in kept.lines("signal")] == [1, 10, 1]
    assert kept.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_service_that_dies_of_a_signal_that_was_passed_on_stays_dead(
    number: int, keep: Callable[..., Kept]
) -> None:
    """SIGTERM may come before its handler is there; SIGHUP has none: the terminal was closed."""
    kept = keep(READY + "signal.pause()")
    kept.up()
    time.sleep(0.1)
    kept.process.send_signal(number)
    assert kept.wait() == 128 + number


def test_a_signal_between_two_services_ends_it(keep: Callable[..., Kept]) -> None:
    """One that was ready, and then fails to start: there is a pause before the next try."""
    kept = keep(_SERVICE + "manager.ready('') if not os.path.exists(sys.argv[1] + '.1') else None\n"
                "open(sys.argv[1] + '.1', 'w')\nsys.exit(1)")  # fmt: skip
    kept.up(2)
    kept.process.send_signal(signal.SIGTERM)
    assert kept.wait() == 143
    assert len(kept.lines("up")) == 2


def test_ctrl_c_on_a_terminal_comes_once(keep: Callable[..., Kept]) -> None:
    """A second one would cut the drain short."""
    ours, theirs = os.openpty()
    kept = keep(
        HEED,
        stdin=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    eventually(lambda: kept.lines("listening"))
    os.write(ours, b"\x03")
    assert kept.wait() == 7
    assert [line["number"] for line in kept.lines("signal")] == [signal.SIGINT]
    os.close(ours)


def test_a_silent_service_is_aborted_and_started_again(keep: Callable[..., Kept]) -> None:
    kept = keep(READY + "for _ in range(5): time.sleep(0.2); manager.watchdog()\ntime.sleep(60)",
                watchdog_s=0.5)  # fmt: skip
    first = kept.up()["pid"]
    kept.up(2)
    assert not is_alive(first)
    (late,) = kept.lines("keeper.watchdog")
    assert late["pid"] == first and "silent" in late["why"]
    assert kept.lines("keeper.restarts")[0]["ended"] == "SIGABRT"


def test_a_service_that_is_not_ready_yet_may_take_its_time(keep: Callable[..., Kept]) -> None:
    kept = keep(_SERVICE + "time.sleep(1.5); manager.ready(''); say('served'); sys.exit(0)",
                watchdog_s=0.5)  # fmt: skip
    assert kept.wait() == 0
    assert kept.lines("served") and not kept.lines("keeper.watchdog")


def test_a_stopped_service_is_killed_in_the_end(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGABRT does not reach it."""
    monkeypatch.setitem(globals(), "_KEEP", "import kvd.keeper; kvd.keeper.ABORT_S = 0.3\n" + _KEEP)
    kept = keep(READY + "os.kill(os.getpid(), signal.SIGSTOP)", watchdog_s=0.3)
    kept.up(2)
    assert kept.lines("keeper.restarts")[0]["ended"] == "SIGKILL"


def test_a_service_that_found_itself_broken_is_replaced(keep: Callable[..., Kept]) -> None:
    kept = keep(READY + "manager.abort_me()\ntime.sleep(60)")
    kept.up(2)
    assert kept.lines("keeper.watchdog")[0]["why"] == "it asked for it"


_ADDRESS = """\
import json, os
print(json.dumps({"event": "at", "address": os.environ["NOTIFY_SOCKET"]}), flush=True)
"""


def test_only_the_service_itself_is_heard(keep: Callable[..., Kept]) -> None:
    """Every user of the host can send to an abstract socket."""
    kept = keep(_ADDRESS + STORE)
    pid = kept.up()["pid"]
    address = kept.lines("at")[0]["address"]
    kept.stored()
    before = kept.num_fds()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.connect("\0" + address[1:])
        for _ in range(20):
            stranger.send(b"FDSTOREREMOVE=1\nFDNAME=meta.a")
            stranger.send(b"WATCHDOG=trigger")
            socket.send_fds(stranger, [b"FDSTORE=1\nFDNAME=mine"], [0, 1, 2] * 80)
    eventually(lambda: kept.num_fds() == before)
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)
    assert sorted(kept.up(2)["fds"]) == ["meta.a", "pool.a.0", "pool.a.1"]


def test_a_service_outlives_its_keeper(keep: Callable[..., Kept]) -> None:
    kept = keep(STORE)
    start = kept.up()
    kept.stored()
    kept.process.kill()
    kept.wait()
    time.sleep(0.2)
    assert is_alive(start["pid"])
    assert start["sid"] == start["pid"]  # no terminal's, so no hang-up's either


def test_orphans_are_reaped_by_a_containers_first_process(keep: Callable[..., Kept]) -> None:
    """PR_SET_CHILD_SUBREAPER makes it inherit them, as process 1 does."""
    reaper = "import ctypes; ctypes.CDLL(None).prctl(36, 1)\n" + _KEEP
    with replaced(reaper):
        kept = keep(READY + "if os.fork() == 0:\n  if os.fork() == 0:\n    time.sleep(0.2)\n"
                    "    say('orphan', parent=os.getppid()); os._exit(0)\n  os._exit(0)\n"
                    "time.sleep(60)")  # fmt: skip
    (orphan,) = eventually(lambda: kept.lines("orphan"))
    assert orphan["parent"] == kept.process.pid
    eventually(lambda: not Path(f"/proc/{orphan['pid']}").exists())
    assert is_alive(kept.up()["pid"])


@contextmanager
def replaced(script: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "_KEEP", script)
        yield


_SILENT = """\
import os, signal
from kvd_shared.notify import NotifySocket
NotifySocket(os.environ["NOTIFY_SOCKET"]).ready("")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_log_that_nobody_reads_is_no_reason_to_end(keep: Callable[..., Kept]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    kept = keep(_SILENT, restarts=2, stdout=writing)
    os.close(writing)
    assert kept.wait() == 137
