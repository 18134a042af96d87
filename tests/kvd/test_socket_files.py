"""Where sockets may be, and who may open them."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.config_error import ConfigError
from kvd.socket_files import made_private, prepare_socket_dir, share_with_group
from tests.integration.other_user import GROUP, STRANGER, needs_root


@pytest.fixture(params=[0o000, 0o022, 0o077], autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Whatever it is, modes are the same."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_directory_is_the_owners_and_the_groups(tmp_path: Path, umask: int) -> None:
    prepare_socket_dir(tmp_path / "deep" / "kvd")
    assert mode(tmp_path / "deep" / "kvd") == 0o750
    prepare_socket_dir(tmp_path / "deep" / "kvd")  # as it is
    assert os.umask(umask) == umask


def test_a_socket_is_never_anybody_elses(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with made_private():
            listener.bind(str(path))
        assert mode(path) & 0o077 == 0
        share_with_group(path)
        assert mode(path) == 0o660


@needs_root
def test_the_group_is_the_directorys(tmp_path: Path) -> None:
    os.chown(tmp_path, -1, GROUP)
    path = tmp_path / "s"
    path.touch()
    share_with_group(path)
    assert path.stat().st_gid == GROUP


@pytest.mark.parametrize("writable", [0o770, 0o757, 0o777, 0o1777])
def test_one_that_others_may_write_is_refused(tmp_path: Path, writable: int) -> None:
    """Also with the sticky bit: whoever is first there chooses what `lease.sock` is."""
    tmp_path.chmod(writable)
    with pytest.raises(ConfigError, match=f"{tmp_path} has mode {writable:04o}: others may write"):
        prepare_socket_dir(tmp_path)


def test_one_below_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match=r"is below .*open, which everybody may write"):
        prepare_socket_dir(tmp_path / "open" / "kvd")
    (tmp_path / "open").chmod(0o1777)  # as /tmp is
    prepare_socket_dir(tmp_path / "open" / "kvd")


@needs_root
def test_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", STRANGER, -1)
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    for path in (tmp_path / "theirs", tmp_path / "link"):
        with pytest.raises(ConfigError, match=f"belongs to user {STRANGER}, the daemon is user 0"):
            prepare_socket_dir(path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o600)
    with pytest.raises(ConfigError, match="is not a directory"):
        prepare_socket_dir(tmp_path / "file")
