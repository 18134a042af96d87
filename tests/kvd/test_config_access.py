"""The [access] section: lists of users and groups by role."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvd.access import Access, Rule
from kvd.config import KvdConfig, load_config
from kvd.config_error import ConfigError
from kvd.process import Process
from kvd_shared.errors import NotAllowed

POOL = "\n[[pool]]\nlayout = {num_layers = 1, num_kv_heads = 1, head_dim = 8}\n"


def load(tmp_path: Path, text: str, **env: str) -> KvdConfig:
    file = tmp_path / "kvd.toml"
    file.write_text(text + POOL)
    return load_config(file, {"KVD_SOCKET_DIR": str(tmp_path)} | env, {})


def access(tmp_path: Path, text: str, **env: str) -> Access:
    return load(tmp_path, text, **env).access.access(tmp_path)


def test_the_standard(tmp_path: Path) -> None:
    own, members = frozenset({os.geteuid(), 0}), frozenset({tmp_path.stat().st_gid})
    for text in ("", "[access]\n"):
        assert access(tmp_path, text) == Access(
            worker=Rule(own, members), admin=Rule(own), observer=Rule(own, members)
        )


def test_names_and_numbers(tmp_path: Path) -> None:
    found = access(tmp_path, '[access]\nworker_users = ["root", 1001]\nadmin_groups = ["root", 7]')
    assert found.worker == Rule(frozenset({0, 1001}))
    assert found.admin == Rule(groups=frozenset({0, 7}))
    assert found.observer == access(tmp_path, "").observer
    variables = {"KVD_ACCESS__WORKER_USERS": "root, 1001", "KVD_ACCESS__SHOW_TOKEN_IDS": "true"}
    from_environment = access(tmp_path, "", **variables)
    assert (from_environment.worker, from_environment.show_token_ids) == (found.worker, True)


def test_an_empty_list_admits_nobody(tmp_path: Path) -> None:
    found = access(tmp_path, "[access]\nadmin_users = []\n")
    with pytest.raises(NotAllowed, match=r"access\.admin_users or a group of it in access"):
        found.check("admin", Process(pid=1, uid=0, gid=0))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("workers = [1]", ["access.workers: no such key; did you mean 'worker_users'?"]),
        ('worker_users = ["nobody-by-that-name"]', ["no user 'nobody-by-that-name'"]),
        ('admin_groups = ["no-such-group"]', ["access.admin_groups", "no group 'no-such-group'"]),
        ("worker_users = 1001", ['must be a list of users, such as ["kvd", 1001]']),
        ("worker_users = [-1]", ["-1 is no user"]),
        ("worker_users = [4294967295]", ["4294967295 is no user", "numbers to 4294967294"]),
        ("worker_users = [true]", ["True is no user"]),
        ('worker_users = [""]', ["'' is no user"]),
        ("worker_users = [1.0]", ["1.0 is no user"]),
        ("show_token_ids = 1", ["must be true or false"]),
        ('show_token_ids = "yes"', ["must be true or false"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, f"[access]\n{line}\n")
    for part in parts:
        assert part in str(refused.value)


def test_a_variable_that_sets_nothing_is_named(tmp_path: Path) -> None:
    for variable, value in (
        ("KVD_ACCESS__WORKER_USER", "1"),
        ("KVD_ACCESS__WORKER_USERS", "nobody-by-that-name"),
        ("KVD_ACCESS_WORKER_USERS", "1"),
    ):
        with pytest.raises(ConfigError, match=variable):
            load(tmp_path, "", **{variable: value})


def test_the_fencing_times(tmp_path: Path) -> None:
    daemon = load(tmp_path, "[daemon]\ndeath_grace_s = 2\nquarantine_alarm_s = 0.5\n").daemon
    assert (daemon.death_grace_s, daemon.quarantine_alarm_s) == (2.0, 0.5)
    daemon = load(tmp_path, "").daemon
    assert (daemon.death_grace_s, daemon.quarantine_alarm_s) == (0.0, 5.0)
