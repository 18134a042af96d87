import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvd import __version__, cli
from kvd.config_sources import FLAGS
from kvd.lockfile import DaemonLock
from kvd.page_pool import PoolTooLarge
from tests.daemon import child_environment

LAYOUT = ["--layout", "num_layers=1,num_kv_heads=1,head_dim=8"]


@pytest.fixture(autouse=True)
def _no_logging_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd_shared.logs.configure", lambda *args: None)
    for name in ("KVD_SOCKET_DIR", "KVD_DAEMON__LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def serve(*arguments: str) -> int:
    return cli.main(["serve", "--no-keeper", *arguments])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"kvd {__version__}, protocol 1\n"


@pytest.mark.parametrize(
    "arguments", [[], ["serve", "--bogus"], ["frobnicate"], ["serve", "--max-restarts", "-1"]]
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


def test_every_flag_is_a_known_setting() -> None:
    assert cli.SERVE_FLAGS.keys() == FLAGS.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no pool is configured"),
        ([*LAYOUT, "--page-size", "12"], "--page-size = '12': must be a power of two"),
        ([*LAYOUT, "--pool-size", "1 pages"], "must be from 2 to"),
        ([*LAYOUT, "--log-level", "loud"], "--log-level = 'loud'"),
        (["--config", "/absent/kvd.toml"], "/absent/kvd.toml: No such file"),
        (["--model", "/absent/model"], "/absent/model"),
    ],
)
def test_a_bad_configuration_is_78_with_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve("--socket-dir", str(tmp_path), *arguments) == 78
    error = capsys.readouterr().err
    assert message in error and error.startswith("kvd: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # no lock file that a daemon would wonder about


def test_a_second_daemon_is_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DaemonLock(tmp_path):
        assert serve("--socket-dir", str(tmp_path), *LAYOUT) == 5
    assert "already serves" in capsys.readouterr().err


def test_a_socket_directory_that_cannot_be_made_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert serve("--socket-dir", str(tmp_path / "file" / "kvd"), *LAYOUT) == 1
    assert f"'{tmp_path / 'file'}" in capsys.readouterr().err


def test_the_configuration_reaches_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []

    def accept(config: Any) -> int:
        served.append(config)
        return 0

    monkeypatch.setattr("kvd.server.serve", accept)
    monkeypatch.setenv("KVD_DAEMON__LOG_LEVEL", "error")
    assert serve("--socket-dir", str(tmp_path), *LAYOUT, "--pool-name", "p") == 0
    (config,) = served
    assert config.daemon.socket_dir == tmp_path and config.daemon.log_level == "error"
    assert config.pools[0].name == "p"


@pytest.mark.parametrize("manager", [None, "@a-manager"])
@pytest.mark.parametrize("refused", [False, True])
def test_a_keeper_is_where_no_manager_is(
    manager: str | None, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles: list[Any] = []

    def be(code: int, *role: Any) -> int:
        roles.append(role)
        return code

    monkeypatch.setattr("kvd.server.serve", lambda config: be(0, "daemon"))
    monkeypatch.setattr("kvd.keeper.keep", lambda *args: be(3, *args))
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager)
    options = ["serve", "--socket-dir", str(tmp_path), *LAYOUT, "--max-restarts", "7"]
    options += ["--no-keeper"] if refused else []
    if manager or refused:
        assert (cli.main(options), roles) == (0, [("daemon",)])
    else:
        assert (cli.main(options), roles) == (3, [(options, 7)])


def test_too_little_memory_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not 78: there may be enough at the next start."""

    def refuse(config: Any) -> int:
        raise PoolTooLarge("a pool of 9 pages needs 9 TiB")

    monkeypatch.setattr("kvd.server.serve", refuse)
    assert serve("--socket-dir", str(tmp_path), *LAYOUT) == 1
    assert "needs 9 TiB" in capsys.readouterr().err


def test_a_start_does_not_import_what_only_structlog_would_like_to_have() -> None:
    program = (
        "import sys; from kvd.cli import main; main(['serve', '--no-keeper', '--config', '/no']); "
        "sys.exit('structlog' not in sys.modules or 'rich' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
