"""The verbs of `kvdctl` that name prompts, and those that change what is cached."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvd.admin import explain, main
from kvd.admin.style import Style
from kvd.departures import REASONS
from kvd_shared import verbs
from kvd_shared.namespace import Namespace
from tests.daemon import RunningDaemon, running_daemon

PAGE = 16  # tokens
SPACE = Namespace(model="m", weights_version=1)
OF_TENANT = Namespace(model="m", weights_version=1, salt=b"acme\n")
TOKENS = list(range(3 * PAGE))


class Terminal:
    """`kvdctl` as its users see it."""

    def __init__(self, capsys: pytest.CaptureFixture[str], prompt: Path) -> None:
        self._capsys = capsys
        self.prompt = str(prompt)

    def fails(self, *arguments: str) -> tuple[int, str]:
        """The exit code, and what is on stderr; nothing is on stdout."""
        code = main(list(arguments))
        said = self._capsys.readouterr()
        assert code != 0 and not said.out
        return code, said.err

    def says(self, *arguments: str) -> str:
        assert main(list(arguments)) == 0
        return self._capsys.readouterr().out.strip()

    def json(self, *arguments: str) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.says(*arguments, "-o", "json"))
        assert shown.pop("schema") == "kvd/v1"
        assert shown.pop("pool") == "default"
        return shown


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningDaemon]:
    """Three pages of a prompt are cached and held by nobody."""
    with running_daemon(tmp_path, page_size=PAGE) as daemon, daemon.attach() as worker:
        monkeypatch.setenv("KVD_SOCKET_DIR", str(daemon.socket_dir))
        refs = worker.call(verbs.allocate(3))
        worker.call(verbs.publish(SPACE, TOKENS, refs))
        worker.call(verbs.free(refs))
        yield daemon
        daemon.check()


@pytest.fixture
def terminal(daemon: RunningDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Terminal:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps([*TOKENS, 7]))
    return Terminal(capsys, prompt)


def publish(daemon: RunningDaemon, space: Namespace) -> None:
    with daemon.attach() as worker:
        refs = worker.call(verbs.allocate(3))
        worker.call(verbs.publish(space, TOKENS, refs))


def test_a_prompt_is_explained(terminal: Terminal) -> None:
    assert terminal.says("explain", terminal.prompt) == (
        "pool default: 48 of 49 tokens match\n"
        "all that may match does: the last token is always computed"
    )
    found = terminal.json("explain", terminal.prompt, "--salt", "acme")
    assert (found["why"], found["matched_tokens"]) == ("other_namespace", 0)
    assert found["other"]["differs_in"] == ["salt"]


def test_the_salt_comes_from_a_file_too(
    daemon: RunningDaemon, terminal: Terminal, tmp_path: Path
) -> None:
    publish(daemon, OF_TENANT)
    (tmp_path / "salt").write_bytes(b"acme\n\n")
    arguments = ["explain", terminal.prompt, "--salt-file", str(tmp_path / "salt")]
    assert terminal.json(*arguments)["matched_tokens"] == 48
    assert terminal.json("explain", terminal.prompt, "--salt", "acme")["matched_tokens"] == 0


def test_the_prompt_comes_from_standard_input(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open(terminal.prompt) as prompt:
        monkeypatch.setattr("sys.stdin", prompt)
        assert terminal.json("explain", "-")["matched_tokens"] == 48


def test_which_namespace_is_meant_has_to_be_clear(
    daemon: RunningDaemon, terminal: Terminal
) -> None:
    publish(daemon, Namespace(model="n"))
    code, error = terminal.fails("explain", terminal.prompt)
    assert code == 2 and "several are cached, say which with --model: m, n" in error
    assert terminal.json("explain", terminal.prompt, "--model", "n")["matched_tokens"] == 48
    terminal.says("flush", "--all")
    code, error = terminal.fails("explain", terminal.prompt)
    assert code == 2 and "nothing is cached" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[1, 2", "cannot be read as JSON"),
        ("{}", "must hold a list of token ids"),
        ("[1, true]", "must hold a list of token ids"),
        ("[-1]", "-1 is no token id"),
        ("[2147483648]", "must be from 0 to 2147483647"),
    ],
)
def test_what_is_no_prompt(terminal: Terminal, text: str, message: str) -> None:
    Path(terminal.prompt).write_text(text)
    code, error = terminal.fails("explain", terminal.prompt)
    assert code == 2 and message in error and terminal.prompt in error


def test_arguments_that_make_no_request(terminal: Terminal) -> None:
    for arguments, message in [
        (["explain", "/absent.json"], "/absent.json"),
        (["explain", terminal.prompt, "--adapter-hex", "x"], "--adapter-hex 'x'"),
        (["explain", terminal.prompt, "--salt-file", "/absent"], "/absent: No such file"),
        (["explain", terminal.prompt, "--salt", "x" * 1025], "the limit is 1024 bytes"),
        (["flush"], "or --all, not both"),
        (["flush", "--all", "--model", "m"], "or --all, not both"),
    ]:
        code, error = terminal.fails(*arguments)
        assert code == 2 and message in error


def test_pages_are_evicted_as_far_as_nobody_holds_them(
    daemon: RunningDaemon, terminal: Terminal
) -> None:
    with daemon.attach("holds") as worker:
        worker.call(verbs.match(SPACE, TOKENS))
        assert terminal.says("evict", "2") == "pool default: 1 page evicted"
        assert terminal.json("evict", "2") == {"num_pages": 0}


def test_a_flush_takes_what_it_names(daemon: RunningDaemon, terminal: Terminal) -> None:
    publish(daemon, OF_TENANT)
    publish(daemon, Namespace(model="n"))
    for arguments, count in [
        (["--salt", "nobody"], 0),
        (["--model", "m", "--weights-version", "2"], 0),
        (["--model", "m", "--salt", ""], 1),
        (["--adapter-hex", "", "--weights-version", "0"], 1),
        (["--all"], 1),
        (["--all"], 0),
    ]:
        assert terminal.json("flush", *arguments) == {"namespaces": count}
    assert terminal.says("tree") == "pool default\nnothing is cached"


def test_a_raised_version_is_not_lowered(terminal: Terminal) -> None:
    said = terminal.says("raise-weights-version", "2", "--model", "m")
    assert said == "pool default: weights version 2 from now on; 1 namespace flushed"
    code, error = terminal.fails("raise-weights-version", "2", "--model", "m")
    assert code == 1 and "must be above the 2 that it is at" in error


def test_a_prompt_is_retained_until_it_is_released(terminal: Terminal) -> None:
    assert terminal.says("retain", terminal.prompt) == (
        "pool default: 48 tokens retained; kvdctl release 1 ends it"
    )
    assert terminal.json("evict", "64") == {"num_pages": 0}
    terminal.says("retain", terminal.prompt, "--for", "3600")
    kept = terminal.json("retained")
    assert (kept["num_pages"], kept["quota"]) == (3, 16)
    assert [(k["number"], k["tokens"], k["matchable"]) for k in kept["retained"]] == [
        (1, 48, True),
        (2, 48, True),
    ]
    assert kept["retained"][0]["expires_s"] is None
    assert 3500 < kept["retained"][1]["expires_s"] <= 3600
    holders = terminal.says("who-holds", "0")
    assert holders.splitlines()[0] == "page 0, generation 0: active, behind 0 pages"
    assert holders.splitlines()[-1].split() == ["0", "operator", "2"]
    terminal.says("flush", "--all")
    table = terminal.says("retained").splitlines()
    assert table[0] == "pool default: 3 of 16 pages retained"
    assert all(line.endswith("flushed: release it") for line in table[2:])
    terminal.says("release", "1")
    terminal.says("release", "2")
    assert terminal.json("retained")["retained"] == []
    code, error = terminal.fails("release", "1")
    assert code == 4 and "nothing is retained under number 1" in error


def test_what_is_held_by_nobody_and_what_is_no_page(terminal: Terminal) -> None:
    assert terminal.says("who-holds", "63") == "page 63, generation 0: free\nheld by nobody"
    code, error = terminal.fails("who-holds", "64")
    assert code == 1 and "the pool has pages 0 to 63" in error


def test_every_reason_is_said_in_words() -> None:
    nothing = dict.fromkeys(["left_s_ago", "unused_before_s", "differs_at", "computed_by", "other"])
    reply: dict[str, Any] = {"pool": "p", "num_tokens": 500, "matched_tokens": 416} | nothing
    left = {"left_s_ago": 5.0, "unused_before_s": 60.0}
    other = {"matched_tokens": 480, "differs_in": ["salt", "adapter"]}
    cases: list[dict[str, Any]] = [
        *({"why": reason} | left for reason in REASONS),
        *({"why": why} for why in explain.WHY),
        {"why": "differs", "differs_at": 417},
        {"why": "computing", "computed_by": {"session": 3, "request": 9, "tokens": 480}},
        {"why": "other_namespace", "other": other},
    ]
    said = [explain.render(reply | case, Style()).splitlines()[1] for case in cases]
    assert len(set(said)) == len(cases)
    assert (
        said[0]
        == "the page that follows was evicted to make room, 5.0s ago, unused for 1m 0s before"
    )
    assert said[-3:] == [
        "token 417 is another one than in what is cached",
        "session 3 is computing it up to token 480 (request 9)",
        "480 tokens are cached for another salt and adapter",
    ]
