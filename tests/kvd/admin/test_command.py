"""`kvdctl` against a daemon: exit codes, JSON, and what is imported."""

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.admin import main
from kvd.admin.command import VERBS
from kvd_shared.client import KvdClient
from tests.daemon import RunningDaemon, running_daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture
def socket_dir(daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVD_SOCKET_DIR", str(daemon.socket_dir))
    return daemon.socket_dir


def test_every_verb_says_its_message_its_reply_and_its_command() -> None:
    for name in VERBS:
        module = importlib.import_module(f"kvd.admin.{name.replace('-', '_')}")
        text = module.__doc__ or ""
        assert text.startswith(f"`kvdctl {name}`: ")
        for part in ("\nMessage   {", "\nReply     {", f"\nCommand   kvdctl {name}"):
            assert part in text, (name, part)


REPORTS = ("status", "pages", "tree", "sessions", "retained", "audit")


@pytest.mark.parametrize("verb", REPORTS)
def test_every_report_as_a_page_and_as_json(
    verb: str, socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb]) == 0
    assert capsys.readouterr().out.strip()
    assert main([verb, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "kvd/v1"


def test_what_a_worker_does_is_seen(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvd_shared import verbs
    from kvd_shared.namespace import Namespace

    space = Namespace(model="m")
    with KvdClient.attach(socket_dir, name="w0") as worker:
        tokens = list(range(40))
        acquired = worker.call(verbs.acquire(space, tokens, 3))
        worker.call(verbs.publish(space, tokens[:32], acquired.refs[:2]))
        outputs = {}
        for verb in REPORTS:
            assert main([verb, "-o", "json"]) == 0
            outputs[verb] = json.loads(capsys.readouterr().out)
    (pool,) = outputs["status"]["pools"]
    assert pool["counts"]["active"] == 2 and pool["counts"]["writing"] == 1
    assert sorted(outputs["pages"]["map"].strip("0")) == ["1", "2", "2"]
    assert outputs["tree"]["namespaces"][0]["nodes"][0]["tokens"] == 32
    session = next(s for s in outputs["sessions"]["sessions"] if s["name"] == "w0")
    assert (session["held_pages"], session["writing_pages"]) == (3, 1)


def test_no_daemon_is_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--socket-dir", str(tmp_path)]) == 3
    assert str(tmp_path) in capsys.readouterr().err


def test_an_unknown_pool_is_4(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pages", "--pool", "absent"]) == 4
    assert "'absent'" in capsys.readouterr().err


def test_a_daemon_that_is_stopped_is_6(
    daemon: RunningDaemon, socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        assert main(["status", "--timeout", "0.2"]) == 6
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert "kvdctl: " in capsys.readouterr().err


def test_a_daemon_that_attaches_but_does_not_answer_is_6(
    daemon: RunningDaemon, socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = KvdClient.attach

    def attach_and_stop(*args: object, **kwargs: object) -> KvdClient:
        client = attach(socket_dir, name="kvdctl", role="admin")
        daemon.process.send_signal(signal.SIGSTOP)
        return client

    monkeypatch.setattr(KvdClient, "attach", attach_and_stop)
    try:
        assert main(["status", "--timeout", "0.2"]) == 6
    finally:
        daemon.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["evict", "0"],
        ["evict"],
        ["who-holds", "-1"],
        ["raise-weights-version", "0"],
        ["flush", "--salt", "x", "--salt-file", "y"],
        ["tree", "--depth", "0"],
        ["pages", "--rows", "x"],
        ["tree", "--sort", "x"],
    ]
    + [["status", "--timeout", value] for value in ("0", "nan", "x")],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_not_knowing_where_to_look_is_78(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 7)
    for name in ("KVD_SOCKET_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["status"]) == 78
    assert "KVD_SOCKET_DIR" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(socket_dir: Path) -> None:
    command = f"{sys.executable} -c 'import sys; from kvd.admin import main; sys.exit(main())'"
    script = f"set -o pipefail; {command} status | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("verb", REPORTS)
def test_a_full_disk_is_one_line_and_1(verb: str, socket_dir: Path) -> None:
    code = "import sys; from kvd.admin import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, verb], stdout=full, stderr=subprocess.PIPE, timeout=30
        )
    assert done.returncode == 1
    assert done.stderr == b"kvdctl: cannot write the answer: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--help"], ["tree", "--help"], ["explain", "--help"]])
def test_help_documents_exit_codes_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from kvd.admin import main
try:
    main({arguments!r})
except SystemExit as e:
    assert e.code == 0
heavy = {{"torch", "numpy", "zmq", "msgpack", "structlog", "asyncio"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "3 daemon unreachable" in done.stdout and "6 timeout" in done.stdout
