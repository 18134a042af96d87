"""Prompts are private: real traffic with a marker in it, which no log and no report shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd.admin import main as kvdctl
from kvd_shared import verbs
from kvd_shared.errors import KvdError
from kvd_shared.namespace import Namespace
from tests.daemon import running_daemon
from tests.integration.http_client import Client, Refused
from tests.integration.tiny_world import PRINTABLE, text_of
from tests.worker import WorkerNursery

MARKER = [PRINTABLE.start + n for n in (57, 3, 81, 22, 90, 41, 66, 12, 75, 30)]
PROMPT = tuple(MARKER * 4)
SALT = b"a-salt-that-is-a-secret"
SPACE = Namespace(model="m", salt=SALT)


def traces(text: str) -> list[str]:
    """In which forms the marker is in it."""
    forms = {
        "text": text_of(MARKER),
        "json": ", ".join(map(str, MARKER[:4])),
        "compact": ",".join(map(str, MARKER[:4])),
        "spaces": " ".join(map(str, MARKER[:4])),
        "bytes": repr(np.array(MARKER[:4], "<i4").tobytes())[2:-1],
        "salt": SALT.decode(),
        "salt in hex": SALT.hex(),
    }
    return [name for name, form in forms.items() if form in text]


def test_no_log_shows_a_prompt(nursery: WorkerNursery, folder: Path, tmp_path: Path) -> None:
    """At info, the usual level: answered and refused requests, over HTTP and by a client of its
    own, and the attempts of somebody who may not."""
    with running_daemon(tmp_path, model=folder, page_size=8, num_pages=64) as daemon:
        worker = nursery.start(daemon, name="private")
        client = Client(worker.url)
        answer = "".join(client.stream(PROMPT, 8))
        again = "".join(client.stream(PROMPT, 8))
        assert answer == again and len(answer) == 8
        with suppress(Refused):
            "".join(client.stream(PROMPT * 100, 8))
        client.close()
        with daemon.attach("own", model=None) as own:
            found = own.call(verbs.acquire(SPACE, PROMPT, 5))
            own.call(verbs.publish(SPACE, PROMPT, found.refs))
            refused: list[verbs.Call[Any]] = [
                verbs.publish(SPACE, PROMPT[:-1], found.refs),
                verbs.match(SPACE, [*PROMPT, 1 << 30]),
                verbs.evict(1),
                verbs.explain(SPACE, PROMPT),
            ]
            for bad in refused:
                with suppress(KvdError):
                    own.call(bad)
        logged = daemon.text() + worker.text()
        worker.close()
        logged += worker.text() if worker.log_file.exists() else ""
    assert "session.attached" in logged and "access.refused" in logged
    assert traces(logged) == []


@pytest.fixture(params=[False, True], ids=["digests", "permitted"])
def shown(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[bool, dict[str, str]]]:
    """What the reports print of a cached prompt, and whether the configuration permits more."""
    access = f"[access]\nshow_token_ids = {str(request.param).lower()}\n"
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(PROMPT[:-1]))
    with running_daemon(tmp_path, page_size=8, settings=access) as daemon, daemon.attach() as own:
        found = own.call(verbs.acquire(SPACE, PROMPT, 5))
        own.call(verbs.publish(SPACE, PROMPT, found.refs))
        monkeypatch.setenv("KVD_SOCKET_DIR", str(daemon.socket_dir))
        (tmp_path / "salt").write_bytes(SALT)
        named = [str(file), "--salt-file", str(tmp_path / "salt")]
        printed = {}
        for output in ("table", "json"):
            for verb in (
                ["status"],
                ["tree"],
                ["tree", "--tokens"],
                ["sessions"],
                ["pages"],
                ["audit"],
                ["who-holds", "0"],
                ["explain", *named],
                ["retain", *named],
                ["retained"],
            ):
                assert kvdctl([*verb, "-o", output]) == 0, verb
                printed[" ".join([*verb[: 2 if verb[0] == "tree" else 1], output])] = (
                    capsys.readouterr().out
                )
        yield request.param, printed


def test_reports_show_digests_unless_the_daemon_permits_more(
    shown: tuple[bool, dict[str, str]],
) -> None:
    permitted, printed = shown
    found = {verb: traces(text) for verb, text in printed.items() if traces(text)}
    if not permitted:
        assert found == {}
        return
    assert found == {"tree --tokens table": ["spaces"], "tree --tokens json": ["json"]}
