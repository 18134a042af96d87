"""The demo as a reader runs it: real processes, the shipped model, the shipped or an own text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelworker.demo.document import clean, fitting, questions
from modelworker.demo.processes import DemoFailed
from modelworker.demo.report import Verdicts

DEMO = [sys.executable, "-m", "modelworker", "demo"]
OWN_TEXT = """
Old Anselm repaired clocks in a cellar below the bakery on Linden Street.   He charged nothing for
cuckoo clocks, because he felt sorry for the birds inside them. In the evenings he wrote letters to
a cousin in Valparaiso who never answered a single one.

One winter the bakery burned down, and eleven clocks kept ticking under the ashes for a week. The
firemen said afterwards that the sound had guided them down the broken stairs. Since that day every
child in the street is allowed to wind one clock on its birthday.
"""


def left_behind(mark: str) -> list[str]:
    """Command lines of processes that have `mark` in them."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if mark in command:
            found.append(command)
    return found


def run(*args: str, tmp: Path) -> subprocess.CompletedProcess[str]:
    """A demo whose temporary folder is under `tmp`, so that its processes can be told apart."""
    env = {**os.environ, "TMPDIR": str(tmp)}
    return subprocess.run([*DEMO, *args], capture_output=True, text=True, env=env, timeout=240)


@pytest.fixture
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d")  # short: sockets lie in it


def test_the_shipped_demo_holds_and_leaves_nothing(tmp: Path) -> None:
    done = run(tmp=tmp)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "✓ the second worker used pages that it never computed",
        "✓ the cache outlived the worker that had filled it",
        "✓ 4 of 4 quotes are word for word",
        "✓ 4 of 4 answers are the same uncached",
        "✓ no session holds a page any more",
        "✓ the audit of all invariants is clean",
    ):
        assert line in done.stdout
    assert left_behind(str(tmp)) == []
    assert list(tmp.iterdir()) == []


def test_a_reader_can_bring_a_text(tmp: Path, tmp_path: Path) -> None:
    document = tmp_path / "own.txt"
    document.write_text(OWN_TEXT)
    done = run("--doc", str(document), tmp=tmp)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_text_without_sentences_is_refused_with_the_number(tmp: Path, tmp_path: Path) -> None:
    document = tmp_path / "short.txt"
    document.write_text("Nothing much. To quote here.")
    done = run("--doc", str(document), tmp=tmp)
    assert done.returncode == 8
    assert "has 0 sentences of enough words" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_ctrl_c_leaves_no_process_and_no_file(tmp: Path, number: int, processes: int) -> None:
    """Whatever moment it comes at: here, the moment the daemon or a worker has just started."""
    env = {**os.environ, "TMPDIR": str(tmp)}
    with subprocess.Popen(DEMO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env) as demo:
        try:
            deadline = time.monotonic() + 60
            while len(left_behind(str(tmp))) < processes:
                assert demo.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            demo.send_signal(number)
            _, err = demo.communicate(timeout=60)
        finally:
            demo.kill()  # nothing if it has ended
    assert demo.returncode == 130, err.decode()
    assert left_behind(str(tmp)) == []
    assert list(tmp.iterdir()) == []


def test_one_false_assertion_fails_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = Verdicts()
    verdicts.check(True, "the sky is up")
    verdicts.conclude()
    verdicts.check(False, "pigs fly")
    with pytest.raises(DemoFailed, match="not so: pigs fly"):
        verdicts.conclude()
    assert "✗ pigs fly" in capsys.readouterr().out


def test_questions_are_sentences_of_the_text() -> None:
    text = clean(OWN_TEXT)
    found = questions(text)
    assert len(found) == 6
    assert all(question.cue + question.answer in f" {text}" for question in found)
    assert len({question.cue for question in found}) == len(found)


class Words:
    """A tokenizer of one token a word."""

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())


def test_fitting_takes_the_longest_beginning_in_whole_words() -> None:
    text = "one two three four five"
    assert fitting(text, Words(), 3) == "one two three"  # type: ignore[arg-type]  # duck-typed
    assert fitting(text, Words(), 9) == text  # type: ignore[arg-type]  # duck-typed
