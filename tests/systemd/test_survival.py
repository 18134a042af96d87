"""Real daemons under the keeper and under a service manager: what is left when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvd_shared import exit_codes, verbs
from kvd_shared.errors import DaemonUnreachable
from tests.daemon import RunningDaemon, child_environment, daemons_of, eventually, running_daemon
from tests.systemd.fake_manager import FakeManager

KILLS = 20
LARGE = 16_384  # pages of 1 KiB, so that there is something to see in /proc/meminfo
MARK = b"not lost"


@dataclass
class Unit:
    """A daemon whose memory somebody keeps; `pid` is the keeper's, or this process's own."""

    daemon: RunningDaemon
    keeper_pid: int
    manager: FakeManager | None
    foreign: frozenset[int] = frozenset()  # inodes of what the keeper had before, of other tests

    def kill(self, number: int = signal.SIGKILL) -> None:
        """The daemon alone; returns when its successor is ready."""
        starts = len(self.daemon.logs("daemon.ready"))
        os.kill(self.daemon.pid, number)
        eventually(lambda: len(self.daemon.logs("daemon.ready")) > starts, 20)

    def kept(self) -> dict[int, int]:
        """Bytes of the daemon's memory that are kept for it, by inode."""
        return {i: n for i, n in memory_of(self.keeper_pid).items() if i not in self.foreign}

    def open(self) -> dict[int, int]:
        """Those that the daemon itself has open."""
        return memory_of(self.daemon.pid)

    def configure(self, old: str, new: str) -> None:
        text = self.daemon.config.read_text()
        assert text.count(old) == 1
        self.daemon.config.write_text(text.replace(old, new))


def memory_of(pid: int) -> dict[int, int]:
    """Bytes of kvd's memory that a process has open, by inode."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(entry).startswith("/memfd:kvd-"):
                stat = entry.stat()
                found[stat.st_ino] = stat.st_blocks * 512
    return found


@contextmanager
def under_keeper(tmp_path: Path, *, max_restarts: int = 1000, **options: int) -> Iterator[Unit]:
    with running_daemon(tmp_path, max_restarts=max_restarts, **options) as daemon:  # type: ignore[arg-type]
        yield Unit(daemon, daemon.process.pid, None)


@contextmanager
def under_manager(
    tmp_path: Path, *, watchdog_s: float | None = None, **options: int
) -> Iterator[Unit]:
    """`running_daemon` makes the folder and the configuration; the manager starts the daemon."""
    with running_daemon(tmp_path, **options) as daemon:  # type: ignore[arg-type]
        daemon.kill()
        daemon.log_file.unlink()
        foreign = frozenset(memory_of(os.getpid()))
        command = [sys.executable, "-m", "kvd", "serve", "--config", str(daemon.config)]
        with FakeManager(command, daemon.log_file, env=child_environment(),
                         watchdog_s=watchdog_s) as manager:  # fmt: skip
            manager.wait_ready()
            eventually(lambda: daemon.logs("daemon.ready"))
            yield Unit(daemon, os.getpid(), manager, foreign)


Start = Callable[..., AbstractContextManager[Unit]]
BOTH = pytest.mark.parametrize("unit_of", [under_keeper, under_manager])


def num_fds(daemon: RunningDaemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def survival(daemon: RunningDaemon) -> str:
    return str(daemon.ask(verbs.status())["pools"][0]["survival"])


@BOTH
def test_the_memory_outlives_twenty_daemons(unit_of: Start, tmp_path: Path) -> None:
    with unit_of(tmp_path) as unit:
        daemon = unit.daemon
        with daemon.attach() as worker:
            assert worker.mapping and worker.pool
            worker.mapping.write_view()[5000 : 5000 + len(MARK)] = MARK
            pool_id = worker.pool.pool_id
        kept, fds = unit.kept(), num_fds(daemon)
        assert len(kept) == 2  # one chunk and the metadata
        for _ in range(KILLS):
            unit.kill()
        with daemon.attach() as worker:
            assert worker.mapping and worker.pool
            assert bytes(worker.mapping.read_view()[5000 : 5000 + len(MARK)]) == MARK
            assert worker.pool.pool_id == pool_id
        assert unit.kept() == kept
        assert survival(daemon) == ("systemd" if unit.manager else "keeper")
        assert len(daemon.logs("pool.warm")) == KILLS and len(daemon.logs("pool.created")) == 1
        assert [line["epoch"] for line in daemon.logs("pool.warm")] == list(range(2, KILLS + 2))
        daemon.check()
        eventually(lambda: num_fds(daemon) <= fds)  # once the askers have been let go


@BOTH
@pytest.mark.parametrize("change", ["size", "page_size", "layout", "kv_dtype"])
def test_another_geometry_frees_the_old_memory_first(
    change: str, unit_of: Start, tmp_path: Path
) -> None:
    """Of two equal sizes, too: what the bytes mean has changed."""
    old, new = {
        "size": (f'"{LARGE} pages"', f'"{LARGE // 2} pages"'),
        "page_size": ("page_size = 16", "page_size = 32"),
        "layout": ("num_kv_heads = 1\nhead_dim = 8", "num_kv_heads = 2\nhead_dim = 4"),
        "kv_dtype": ('kv_dtype = "auto"', 'kv_dtype = "float16"'),
    }[change]
    with unit_of(tmp_path, num_pages=LARGE) as unit:
        daemon = unit.daemon
        pool_id = daemon.logs("pool.created")[0]["pool_id"]
        kept = unit.kept()
        unit.configure(old, new)
        unit.kill()
        after = unit.kept()
        assert not kept.keys() & after.keys() and len(after) == 2
        assert unit.open() == after
        (cold,) = daemon.logs("pool.cold")
        assert cold["why"]
        created = daemon.logs("pool.created")[1]
        assert created["pool_id"] != pool_id
        assert sum(after.values()) >= created["pool_bytes"]
        unit.kill()
        assert unit.kept() == after and len(daemon.logs("pool.warm")) == 1


def test_there_is_no_moment_with_both_memories(tmp_path: Path) -> None:
    """A machine has room for one pool. Watched while the daemon is replaced."""
    with under_keeper(tmp_path, num_pages=LARGE * 4) as unit:
        once = sum(unit.kept().values())
        base = _shmem() - once
        unit.configure(f'"{LARGE * 4} pages"', f'"{LARGE * 4 + 2} pages"')
        watched = subprocess.Popen(
            [sys.executable, "-c", _WATCH], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        )
        assert watched.stdout is not None and watched.stdout.readline() == "watching\n"
        unit.kill()
        most = int(watched.communicate()[0])
        assert len(unit.daemon.logs("pool.created")) == 2
        assert most - base < 1.5 * once, f"{most - base} bytes, one pool has {once}"


_WATCH = """\
import select, sys
print("watching", flush=True)
most = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    for line in open("/proc/meminfo"):
        if line.startswith("Shmem:"):
            most = max(most, int(line.split()[1]) * 1024)
print(most)
"""


def _shmem() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("Shmem:")[1].split()[0]) * 1024


@BOTH
def test_a_pool_that_is_configured_no_more_is_freed(unit_of: Start, tmp_path: Path) -> None:
    with unit_of(tmp_path) as unit:
        kept = unit.kept()
        unit.configure('name = "default"', 'name = "other"')
        unit.kill()
        assert not kept.keys() & unit.kept().keys() and len(unit.kept()) == 2


def test_the_daemon_outlives_its_keeper_and_says_what_that_means(tmp_path: Path) -> None:
    with under_keeper(tmp_path) as unit, unit.daemon.attach() as worker:
        daemon = unit.daemon
        pid = daemon.pid
        assert survival(daemon) == "keeper"
        os.kill(unit.keeper_pid, signal.SIGKILL)
        daemon.process.wait()
        eventually(lambda: daemon.logs("survival.lost"), 3)
        assert survival(daemon) == "none"
        assert len(worker.call(verbs.allocate(3))) == 3
        assert daemon.pid == pid and len(daemon.logs("survival.lost")) == 1
        os.kill(pid, signal.SIGTERM)  # and it ends as any other
        eventually(lambda: not daemons_of(daemon.config))


def test_the_keeper_ends_with_its_daemon(tmp_path: Path) -> None:
    with under_keeper(tmp_path) as unit:
        assert unit.daemon.stop() == exit_codes.OK
        assert not daemons_of(unit.daemon.config)
        with pytest.raises(DaemonUnreachable):
            unit.daemon.attach()


def test_a_bad_configuration_at_a_restart_is_not_tried_again(tmp_path: Path) -> None:
    with under_keeper(tmp_path) as unit:
        unit.configure("page_size = 16", "page_size = 17")
        os.kill(unit.daemon.pid, signal.SIGKILL)
        assert unit.daemon.wait() == exit_codes.BAD_CONFIG
        assert not daemons_of(unit.daemon.config)


def test_a_crash_loop_ends(tmp_path: Path) -> None:
    with under_keeper(tmp_path, max_restarts=2) as unit:
        for _ in range(2):
            unit.kill()
        os.kill(unit.daemon.pid, signal.SIGKILL)
        assert unit.daemon.wait() == 128 + signal.SIGKILL
        assert unit.daemon.logs("keeper.gave_up")


def test_without_a_keeper_it_is_said(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        assert survival(daemon) == "none"
        assert daemon.logs("daemon.ready")[0]["survival"] == "none"


def test_a_managers_unit_from_start_to_stop(tmp_path: Path) -> None:
    with under_manager(tmp_path) as unit:
        assert unit.manager is not None
        assert unit.manager.names() == ["meta.default", "pool.default.0"]
        assert unit.manager.status.startswith("default: 64 of 64 pages free")
        unit.manager.restart()  # as after an upgrade: warm
        unit.manager.wait_ready(2)
        unit.manager.wait_until("STOPPING=1")
        assert len(unit.daemon.logs("pool.warm")) == 1
        unit.manager.stop()
        assert unit.manager.exits[-1] == 0 and unit.manager.names() == []
        assert not unit.manager.refused
    assert unit.kept() == {}


def test_a_daemon_that_hangs_is_aborted_and_comes_back_warm(tmp_path: Path) -> None:
    with under_manager(tmp_path, watchdog_s=1) as unit:
        assert unit.manager is not None
        time.sleep(2.5)  # longer than the watchdog's time: it is fed
        assert unit.manager.readies == 1
        os.kill(unit.daemon.pid, signal.SIGSTOP)
        time.sleep(1.2)
        os.kill(unit.daemon.pid, signal.SIGCONT)  # so that the SIGABRT reaches it
        unit.manager.wait_ready(2)
        assert unit.manager.exits == [-signal.SIGABRT]
        assert "Fatal Python error: Aborted" in unit.daemon.text()  # and where it was
        assert len(unit.daemon.logs("pool.warm")) == 1


def test_a_store_that_is_too_small_is_said(tmp_path: Path) -> None:
    with under_manager(tmp_path) as unit:
        assert unit.manager is not None
        unit.manager.max_fds = 1
        unit.configure("page_size = 16", "page_size = 32")
        unit.kill()
        assert survival(unit.daemon) == "none"
        assert "FileDescriptorStoreMax=" in unit.daemon.logs("survival.lost")[0]["remedy"]
        unit.manager.says_max_fds = False  # systemd before version 254
        unit.kill()
        unit.kill()
        assert len(unit.daemon.logs("pool.created")) == 4  # never warm, never wrong
        unit.daemon.check()


def test_foreign_fds_are_neither_used_nor_kept(tmp_path: Path) -> None:
    """A unit's sockets, and memory of the right name that is somebody else's."""
    strange = os.memfd_create("strange")
    os.truncate(strange, 1 << 26)
    with running_daemon(tmp_path) as daemon:
        daemon.kill()
        daemon.log_file.unlink()
        command = [sys.executable, "-m", "kvd", "serve", "--config", str(daemon.config)]
        foreign = {"kvd.socket": strange, "pool.default.0": strange, "meta.default": strange}
        with FakeManager(command, daemon.log_file, env=child_environment(),
                         foreign=foreign) as manager:  # fmt: skip
            manager.wait_ready()
            eventually(lambda: daemon.logs("daemon.ready"))
            assert len(daemon.logs("pool.created")) == 1 and daemon.logs("pool.cold")
            fds = [os.readlink(p) for p in Path(f"/proc/{daemon.pid}/fd").iterdir()]
            assert not [fd for fd in fds if "strange" in fd]
            assert manager.names() == ["meta.default", "pool.default.0"]
            daemon.check()
    os.close(strange)


def test_listen_fds_of_another_process_are_not_touched(tmp_path: Path) -> None:
    """A daemon that a shell started, which had inherited the variables."""
    with running_daemon(tmp_path) as daemon:
        daemon.kill()
        log = daemon.log_file.open("ab")
        names = "pool.default.0:meta.default"
        listen = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": names, "LISTEN_PID": "1"}
        daemon.process = subprocess.Popen(
            [sys.executable, "-m", "kvd", "serve", "--no-keeper", "--config", str(daemon.config)],
            env=child_environment() | listen, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        log.close()
        eventually(lambda: len(daemon.logs("daemon.ready")) == 2)
        assert daemon.logs("fds.not_ours")
        daemon.check()
