"""What docs/protocol.md says is what the code does."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from kvd.cache import MAX_BEGUN_AT_ONCE, CacheManager
from kvd.daemon import Daemon, Pool
from kvd.lease_server import HANDSHAKE_TIMEOUT_S
from kvd.operations import OPERATIONS
from kvd.page_pool import MAX_CHUNKS, MemfdPool
from kvd.reports import REPORTS
from kvd.rpc_server import RpcServer
from kvd_shared import errors, lease, namespace, verbs, wire
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import AttachRequest, PoolOffer
from kvd_shared.namespace import Namespace
from kvd_shared.rpc import Reply, RpcCodec, read_reply
from tests.daemon import running_daemon

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
CALL = verbs.acquire(Namespace(model="m"), [1, 2, 3], 1)


def block(kind: str) -> bytes:
    """The bytes of a commented dump: on each line the hex pairs before the meaning."""
    [text] = re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [re.match(r"[0-9a-f ]+(?=  |$)", line) for line in text.splitlines()]
    return bytes.fromhex("".join(line[0] for line in lines if line))


def table(after: str) -> dict[str, list[str]]:
    """The rows of the first table behind a heading: the cells, by the first one."""
    rows = re.search(r"\n\|---.*?\n((?:\|.*\n)+)", PAGE[PAGE.index(after) :])
    assert rows is not None
    cells = [[c.strip() for c in row.strip("|").split(" | ")] for row in rows[1].splitlines()]
    return {name.strip("`| "): rest for name, *rest in cells}


def names(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def test_the_request_is_what_the_client_sends() -> None:
    _, frames = RpcCodec(bytes(range(16))).request(CALL)
    assert frames == [block("request")]


async def test_the_reply_is_what_the_daemon_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_bytes", lambda n: bytes(range(n)))
    layout = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=1, page_size=8, dtype="float32")
    pool = Pool("p", "cpu", MemfdPool(layout, 4), None, CacheManager(4, 8))
    daemon = Daemon([pool], tmp_path, 0.0)
    session = daemon.attach(AttachRequest(role="worker", name="w", pid=1), 1, 0, 0.0).session
    assert session is not None
    used = pool.cache.allocate(session, 3, None)
    pool.cache.free(session, used, 0.0)
    server = RpcServer(daemon, tmp_path, asyncio.get_running_loop())
    assert server._answer(b"route", 1, [block("request")]) == [block("reply")]
    server.close()
    pool.memory.close()


def test_the_reply_reads_as_said() -> None:
    frames = [block("reply")]
    found = read_reply(CALL, Reply(1, wire.read_header(frames), frames))
    assert found.refs.tolist() == [1 << 32 | 2]
    assert (found.num_matched_pages, found.matched_tokens, found.stop) == (0, 0, "limit")


def test_every_operation_is_described_with_its_arguments() -> None:
    """The verbs build the messages, so their arguments are those of the page."""
    builders = {name: getattr(verbs, name) for name in [*OPERATIONS, *REPORTS, "step", "detach"]}
    values: dict[str, Any] = {"namespace": Namespace(model="m"), "tokens": [1], "refs": [1]}
    values |= {"num_pages": 1, "count": 1, "request": 1, "calls": []}
    worker, admin = table("### Operations of role worker"), table("### Operations of role admin")
    assert worker.keys() == OPERATIONS.keys() | {"step", "detach"}
    assert admin.keys() == REPORTS.keys()
    for op, build in builders.items():
        wanted = [p for p in inspect.signature(build).parameters.values() if p.default is p.empty]
        call = build(**{p.name: values[p.name] for p in wanted})
        assert names((worker | admin)[op][0]) == set(call.args), op


def test_every_error_is_described() -> None:
    rows = table("## Errors")
    assert rows.keys() == errors._BY_CODE.keys()
    for code, kind in errors._BY_CODE.items():
        assert rows[code][0] == ("yes" if kind.retryable else "no"), code


def test_the_attach_packets_are_described() -> None:
    request = msgpack.unpackb(AttachRequest(role="worker", name="w", pid=1).to_wire())
    assert table("## Attaching").keys() == request.keys()
    reply = msgpack.unpackb(lease.accepted(1, b"t", None))
    assert table("The answer is one packet").keys() == reply.keys()
    assert table("| `pool` | map or nil | nil for").keys() == set(PoolOffer.__slots__)


def test_the_limits_are_described() -> None:
    assert (wire.PROTOCOL_VERSION, wire.TOKEN_LENGTH) == (1, 16)
    assert "Version 1." in PAGE
    for limit in (
        f"attach packet | {wire.MAX_ATTACH_BYTES >> 10} KiB",
        f"header or raw | {wire.MAX_FRAME_BYTES >> 20} MiB",
        f"calls in a step | {verbs.MAX_CALLS_A_STEP:,}",
        f"| 1 to {MAX_BEGUN_AT_ONCE:,} |",
        f"arrays from {wire.INLINE_BYTES:,} bytes on",
        f"| {lease.MAX_NAME_CHARACTERS}; {lease.MAX_TEXT_CHARACTERS} printable characters",
        f"| {namespace.MAX_FIELD_BYTES:,} bytes each",
        f"| {HANDSHAKE_TIMEOUT_S:.0f} s |",
        f"at most {MAX_CHUNKS} |",
    ):
        assert limit in PAGE, limit


def test_the_python_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    with running_daemon(tmp_path) as daemon:
        scope: dict[str, Any] = {"socket_dir": daemon.socket_dir}
        for example in examples:
            exec(compile(example, "docs/protocol.md", "exec"), scope)
        assert daemon.counts()["free"] == 62
        daemon.check()
    said = re.search(r"^prints `(.*?)`", PAGE, re.MULTILINE)
    assert said is not None
    assert capsys.readouterr().out.strip() == said[1]
    assert np.array_equal(scope["done"].refs, scope["found"].refs[:2])
