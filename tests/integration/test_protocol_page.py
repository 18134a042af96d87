"""What docs/protocol.md says is what the code does."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from kvd import arguments, explain, operations
from kvd.admin import explain as said
from kvd.announcements import MAX_WAITERS
from kvd.behind import MAX_WAITING, MAX_WAITING_BYTES
from kvd.breaches import BURST, ERRORS_PER_S
from kvd.cache import MAX_FORKS, CacheManager
from kvd.chores import MAX_JOBS
from kvd.config import DaemonConfig
from kvd.daemon import MAX_SESSIONS, Attachment, Daemon, Pool
from kvd.departures import REASONS, REMEMBERED
from kvd.dispatch import FOR_ADMINS, perform
from kvd.handover import MAX_TICKETS, MAX_TTL_S
from kvd.lease_server import HANDSHAKE_TIMEOUT_S
from kvd.matching import MAX_BEGUN_AT_ONCE
from kvd.metadata import Geometry, create_metadata, open_metadata
from kvd.operations import OPERATIONS
from kvd.operator_retains import MAX_RETAINS
from kvd.options import Limits
from kvd.page_pool import MAX_CHUNKS, MemfdPool
from kvd.process import Process, start_ticks
from kvd.recovery import MAX_HOLDS, recover
from kvd.reply_window import WINDOW, WINDOW_BYTES
from kvd.results import STOPS
from kvd.resume import admitted, reopen, resume
from kvd.rpc_server import MAX_MESSAGE_BYTES, RpcServer
from kvd.sequences import MAX_AHEAD
from kvd.tree_report import MAX_TREE_NODES
from kvd.versions import MAX_MODELS
from kvd_shared import errors, lease, namespace, verbs, wire
from kvd_shared.errors import KvdError
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import AttachRequest, FenceOffer, PoolOffer
from kvd_shared.namespace import Namespace
from kvd_shared.page_state import PageState
from kvd_shared.resume import ResumeRequest, resumed
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
    rows = re.search(r"\n *\|---.*?\n((?: *\|.*\n)+)", PAGE[PAGE.index(after) :])
    assert rows is not None
    cells = [[c.strip() for c in row.strip(" |").split(" | ")] for row in rows[1].splitlines()]
    return {name.strip("`| "): rest for name, *rest in cells}


def names(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def optional(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`\?", cell))


WORKER = table("## Operations of role worker")
ADMIN = table("Reads change nothing,") | table("Changes never touch what")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Without sockets: four pages of eight tokens."""
    layout = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=1, page_size=8, dtype="float32")
    pool = Pool("p", "cpu", MemfdPool(layout, 4), None, CacheManager(4, 8))
    yield Daemon([pool], tmp_path, 0.0)
    pool.memory.close()


def attach(daemon: Daemon, role: str) -> Attachment:
    return daemon.attach(
        AttachRequest(role=role, name=role, pid=1), Process(pid=1, uid=0, gid=0), 0.0
    )


def ask(daemon: Daemon, asking: Attachment, op: str, args: dict[str, Any]) -> dict[str, Any]:
    """The result of one operation, those in slices to their end."""
    result = perform(daemon, asking, op, args, [], 1.0)
    while not isinstance(result, dict):
        try:
            next(result)
        except StopIteration as end:
            result = end.value
    return result


def test_the_request_is_what_the_client_sends() -> None:
    _, frames = RpcCodec(bytes(range(16))).request(CALL)
    assert frames == [block("request")]


async def test_the_reply_is_what_the_daemon_answers(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_bytes", lambda n: bytes(range(n)))
    worker = attach(daemon, "worker")
    used = ask(daemon, worker, "allocate", {"num_pages": 3})["refs"]
    ask(daemon, worker, "free", {"refs": used})
    server = RpcServer(daemon, tmp_path, asyncio.get_running_loop())
    assert server._answer(b"route", (1, 0), [block("request")]) == [block("reply")]
    server.close()


def test_the_reply_reads_as_said() -> None:
    frames = [block("reply")]
    found = read_reply(CALL, Reply(1, wire.read_header(frames), frames))
    assert found.refs.tolist() == [1 << 32 | 2]
    assert (found.num_matched_pages, found.matched_tokens, found.stop) == (0, 0, "limit")


def built(op: str) -> dict[str, Any]:
    """Arguments of the operation as the verbs send them."""
    values: dict[str, Any] = {"namespace": Namespace(model="m"), "tokens": [1], "refs": [1]}
    values |= {"retention": verbs.Retention(), "ticket": bytes(16), "own_rate": 1.0, "calls": []}
    values |= {name: [1] for name in ("sequences", "computed", "counts", "requests")}
    build = getattr(verbs, op)
    wanted = [p for p in inspect.signature(build).parameters.values() if p.default is p.empty]
    args: dict[str, Any] = build(**{p.name: values.get(p.name, 1) for p in wanted}).args
    return args


def test_every_operation_is_described() -> None:
    assert WORKER.keys() == OPERATIONS.keys() | {"step", "detach", "declare"}
    assert ADMIN.keys() == FOR_ADMINS.keys()


@pytest.mark.parametrize("op", [*WORKER, *ADMIN])
def test_the_arguments_are_those_described(op: str, daemon: Daemon) -> None:
    """The verbs send them all; what is marked can be left out or nil, and nothing else."""
    args, cell = built(op), (WORKER | ADMIN)[op][0]
    assert names(cell) == args.keys()
    asking = attach(daemon, "worker" if op in WORKER else "admin")
    for name in args:
        less = {k: v for k, v in args.items() if k != name}
        if name in optional(cell):
            for fewer in (less, less | {name: None if name != "announce" else False}):
                with suppress(KvdError):
                    ask(daemon, asking, op, fewer)
            continue
        with pytest.raises(errors.BadRequest, match=f"{op}: argument '{name}' is missing"):
            ask(daemon, asking, op, less)


def test_the_results_are_those_described(daemon: Daemon, tmp_path: Path) -> None:
    """Each operation once, in a story that none of them refuses."""
    worker, admin = attach(daemon, "worker"), attach(daemon, "admin")
    as_match = names(WORKER["match"][1])
    told: set[str] = set()

    def do(op: str, **args: Any) -> dict[str, Any]:
        result = ask(daemon, worker if op in WORKER else admin, op, args)
        cell = (WORKER | ADMIN)[op][1].replace("`match`", "")
        described = names(cell) | (as_match if "as `match`" in (WORKER | ADMIN)[op][1] else set())
        assert result.keys() == described or (op, result) == ("wait", {"stop": "nothing"}), op
        told.add(op)
        return result

    prompt = {"namespace": Namespace(model="m").to_wire(), "tokens": ints(range(9))}
    page = {**prompt, "tokens": ints(range(8))}
    request = do("begin", count=1)["request"]
    refs = do("acquire", **prompt, num_pages=1, request=request)["refs"]
    do("announce", **prompt, request=request)
    do("publish", **page, refs=refs)
    do("retain", refs=refs, retention=verbs.Retention(priority=50).to_wire())
    do("match", **prompt)
    do("probe", **prompt)
    do("share", refs=refs)
    do("fork", refs=refs, num_tokens=8, count=1)
    do("make_writable", ref=int.from_bytes(refs, "little"))
    ticket = do("hand_over", refs=refs, ttl_s=1)["ticket"]
    do("take_over", ticket=ticket)
    tail = do("allocate", num_pages=1)["refs"]
    do("seal_tail", ref=int.from_bytes(tail, "little"), num_tokens=3)
    do("free", refs=tail)
    leased = do("lease", num_pages=1)["refs"]
    do("use", refs=leased)
    do("free", refs=leased)
    do("yielded", request=request)
    do("wait", **prompt, request=request, own_rate=1.0)
    do("end", request=request)
    handle = do("open_sequence", **page, ahead=0)["sequence"]
    row = {"sequences": longs(handle), "computed": ints([8]), "counts": ints([0]), "tokens": b""}
    do("extend", **row)
    forked = do("fork_sequence", sequence=handle, requests=[None])["sequences"]
    do("close_sequences", sequences=longs(handle, *forked))
    do("step", calls=[])
    for op in ("status", "pages", "sessions", "audit", "retained"):
        do(op)
    do("tree", max_nodes=1)
    do("explain", **prompt)
    do("who_holds", page=0)
    do("evict", num_pages=1)
    number = do("retain_prompt", **prompt)["number"]
    do("release_prompt", number=number)
    do("flush")
    do("raise_weights_version", version=1)
    victim = subprocess.Popen(["sleep", "60"])
    process = Process(pid=victim.pid, uid=0, gid=0, pidfd=os.pidfd_open(victim.pid))
    request_to_attach = AttachRequest(role="worker", name="victim", pid=victim.pid)
    do("kill_session", session=daemon.attach(request_to_attach, process, 0.0).id)
    assert victim.wait() == -signal.SIGKILL
    process.close()
    do("detach")
    assert ask_resumed(tmp_path) == names(WORKER["declare"][1])
    told.add("declare")
    assert told == {*WORKER, *ADMIN}


def ask_resumed(folder: Path) -> set[str]:
    """What a session is answered that declares nothing, behind a restart."""
    layout = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=1, page_size=8, dtype="float32")
    geometry, kept = Geometry(num_pages=4, page_size=8), "0" * 16
    meta = create_metadata(geometry, kept)
    me = Process(pid=os.getpid(), uid=os.geteuid(), gid=0, start_ticks=start_ticks(os.getpid()))
    request = AttachRequest(role="worker", name="w", pid=me.pid)
    pool = Pool("p", "cpu", MemfdPool(layout, 4), None, CacheManager(4, 8, meta=meta), kept)
    token = Daemon([pool], folder, 0.0).attach(request, me, 0.0).token
    meta = open_metadata(os.dup(meta.fd), geometry)
    cache = CacheManager(4, 8, meta=meta)
    pool = Pool("p", "cpu", pool.memory, None, cache, kept, recover(cache, 0.0))
    daemon = Daemon([pool], folder, 0.0)
    reopen(daemon, 0.0, 5.0)
    attachment = admitted(daemon, ResumeRequest(token=token, epoch=1, pool_id=kept, pid=me.pid), me)
    resume(daemon, attachment, token, 0.0)
    result = ask(daemon, attachment, "declare", {"refs": b"", "counts": b"", "done": True})
    attachment.process.close()
    pool.memory.close()
    return set(result)


def ints(values: Iterable[int]) -> bytes:
    return np.array([*values], dtype="<i4").tobytes()


def longs(*values: int) -> bytes:
    return np.array(values, dtype="<i8").tobytes()


def test_the_fields_of_a_pool_are_described(daemon: Daemon) -> None:
    [pool] = ask(daemon, attach(daemon, "admin"), "status", {})["pools"]
    rows = re.search(r"\| field of a pool \| means.*?\n\n", PAGE, re.DOTALL)
    assert rows is not None
    described = [re.match(r"\| ([^|]*)", line) for line in rows[0].splitlines()[2:]]
    assert {n for row in described if row for n in names(row[1])} == pool.keys()


def test_the_fields_of_an_extended_row_are_described() -> None:
    rows = re.search(r"\| field of the result.*?\n\n", PAGE, re.DOTALL)
    assert rows is not None
    first = [row.split("|")[1] for row in rows[0].strip().splitlines()[2:]]
    assert {name for cell in first for name in names(cell)} == names(WORKER["extend"][1])


def test_page_states_stops_reasons_and_notices_are_described() -> None:
    states = table("In page maps a state is one byte")
    assert {int(k): names(v[0]) for k, v in states.items()} == {
        int(state): {state.name.lower()} for state in PageState
    }
    assert table("  | `stop` | means").keys() == STOPS.keys()
    told = re.findall(r'"why": "(\w+)"', Path(explain.__file__).read_text())
    assert {"limit", "page_boundary"} <= (why := table("| `why` of `explain`").keys())
    assert why == {*told, *REASONS, "limit", "page_boundary"}
    assert table("#### Notices").keys() == {"yield", "progress", "ready", "ended"}


def test_every_reason_that_explain_gives_can_be_said_by_kvdctl() -> None:
    assert table("| `why` of `explain`").keys() == {
        *said.LEFT, *said.WHY, "differs", "computing", "other_namespace"
    }  # fmt: skip


def test_every_error_is_described() -> None:
    rows = table("## Errors")
    assert rows.keys() == errors._BY_CODE.keys()
    for code, kind in errors._BY_CODE.items():
        assert rows[code][0] == ("yes" if kind.retryable else "no"), code


def test_the_attach_packets_are_described() -> None:
    request = msgpack.unpackb(AttachRequest(role="worker", name="w", pid=1).to_wire())
    assert table("## Attaching").keys() == request.keys()
    reply = msgpack.unpackb(lease.accepted(1, b"t", 1, None, None))
    assert table("The answer is one packet").keys() == reply.keys()
    fence = FenceOffer(8, 1).to_wire()
    assert fence.keys() <= names(PAGE[PAGE.index("### The fence") :][:200])
    again = ResumeRequest(token=bytes(16), epoch=1, pool_id="0" * 16, pid=1)
    assert table("### Resuming").keys() == msgpack.unpackb(again.to_wire()).keys()
    reply = msgpack.unpackb(resumed(1, 1, "0" * 16))
    assert table("| field of the answer | type").keys() == reply.keys()
    assert table("| field of `pool` | type").keys() == set(PoolOffer.__slots__)


def test_the_limits_are_described() -> None:
    assert (wire.PROTOCOL_VERSION, wire.TOKEN_LENGTH) == (1, 16)
    assert "Version 1." in PAGE
    for limit in (
        f"attach packet | {wire.MAX_ATTACH_BYTES >> 10} KiB",
        f"header or raw | {wire.MAX_FRAME_BYTES >> 20} MiB",
        f"a message together | {MAX_MESSAGE_BYTES >> 20} MiB |",
        f"room for {lease.MAX_FDS}, and check",
        f"in one `declare`; holds on one of them | {verbs.MAX_DECLARED:,}; {MAX_HOLDS:,} |",
        f"at most {verbs.MAX_DECLARED:,} in one call) and how many holds",
        f"kept of a session | {WINDOW}, of {WINDOW_BYTES >> 10} KiB together",
        f"the last {WINDOW} answers of a session, if they are {WINDOW_BYTES >> 10} KiB",
        f"of a connection | {BURST:,} at once, {ERRORS_PER_S:.0f} a second",
        f"nobody's token ({BURST:,} at once, or {ERRORS_PER_S:.0f} a second",
        f"`daemon.resume_grace_s` ({DaemonConfig(socket_dir=Path()).resume_grace_s:.0f} s)",
        f"calls in a step | {verbs.MAX_CALLS_A_STEP:,}",
        f"| {arguments.MAX_ARRAY_BYTES >> 20} MiB | `TOO_LARGE`; in a step",
        f"handles of `close_sequences` | {operations.MAX_ROWS:,}",
        f"of the pool, {Limits().max_prompt_tokens:,} unless configured",
        f"`limits.max_requests_a_session`, {Limits().max_requests_a_session:,} unless configured",
        f"`daemon.max_sessions`, {MAX_SESSIONS:,} unless configured",
        f"`requests` of `fork_sequence` | 1 to {MAX_FORKS:,}",
        f"| `ahead` | 0 to {MAX_AHEAD} pages",
        f"| tickets of a pool | {MAX_TICKETS:,} |",
        f"| above 0, to {MAX_TTL_S:.0f} |",
        f"wait for one announcement | {MAX_WAITERS:,} |",
        f"operators retain | {MAX_RETAINS:,} |",
        f"version of their own | {MAX_MODELS:,} |",
        f"| `max_nodes` | 1 to {MAX_TREE_NODES:,} |",
        f"has {MAX_JOBS} long requests under way, or {MAX_WAITING:,} messages or "
        f"{MAX_WAITING_BYTES >> 20} MiB of the same peer",
        f"the last {REMEMBERED:,} departures",
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
