import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvd.lockfile import AlreadyRunning, DaemonLock


def test_a_second_daemon_is_refused_and_told_the_first_ones_pid(tmp_path: Path) -> None:
    with DaemonLock(tmp_path):
        with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}") as refused:
            DaemonLock(tmp_path)
        assert refused.value.pid == os.getpid()
    DaemonLock(tmp_path).release()


def test_other_directories_are_independent(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with DaemonLock(tmp_path / "a"), DaemonLock(tmp_path / "b"):
        pass


def test_a_killed_daemon_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, signal; from pathlib import Path; from kvd.lockfile import DaemonLock\n"
        "lock = DaemonLock(Path(sys.argv[1])); print('held', flush=True); signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(AlreadyRunning) as refused:
            DaemonLock(tmp_path)
        assert refused.value.pid == holder.pid
        holder.send_signal(signal.SIGKILL)
    DaemonLock(tmp_path).release()


def test_a_holder_that_has_not_written_its_pid_is_a_holder(tmp_path: Path) -> None:
    with DaemonLock(tmp_path):
        os.truncate(tmp_path / "kvd.lock", 0)
        with pytest.raises(AlreadyRunning, match="has not written its pid") as refused:
            DaemonLock(tmp_path)
        assert refused.value.pid is None


def test_release_is_idempotent_and_clears_the_pid(tmp_path: Path) -> None:
    lock = DaemonLock(tmp_path)
    lock.release()
    lock.release()
    assert (tmp_path / "kvd.lock").read_bytes() == b""


def test_a_symbolic_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("data")
    (tmp_path / "kvd.lock").symlink_to(target)
    with pytest.raises(OSError, match=r"symbolic"):
        DaemonLock(tmp_path)
    assert target.read_text() == "data"
