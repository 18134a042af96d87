from pathlib import Path

import pytest

from kvd_shared.socket_dir import MAX_SOCKET_PATH_BYTES, check_socket_dir, default_socket_dir


@pytest.mark.parametrize(
    ("env", "uid", "expected"),
    [
        ({}, 0, "/run/kvd"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 0, "/run/kvd"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7/kvd"),
        ({"XDG_RUNTIME_DIR": "/run/user/7", "KVD_SOCKET_DIR": "/srv/kvd"}, 7, "/srv/kvd"),
    ],
)
def test_default(env: dict[str, str], uid: int, expected: str) -> None:
    assert default_socket_dir(env, uid) == Path(expected)


def test_no_directory_is_guessed_for_a_user_without_a_runtime_directory() -> None:
    with pytest.raises(ValueError, match=r"KVD_SOCKET_DIR nor XDG_RUNTIME_DIR"):
        default_socket_dir({}, 7)


def test_the_longest_path_that_the_kernel_takes_is_the_limit() -> None:
    fits = "/" + "d" * (MAX_SOCKET_PATH_BYTES - len("//lease.sock"))
    check_socket_dir(Path(fits))
    with pytest.raises(ValueError, match=r"has 108 bytes, the limit is 107"):
        check_socket_dir(Path(fits + "d"))
