"""A million messages that no client of ours would send, at a daemon that watches itself.

The run is made of blocks of messages, each from a generator of its own (seed, block) under sessions
of its own: it can be stopped after any block and gone on with, and one block can be looked at
again by itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import zmq

from kvd_shared import verbs
from kvd_shared.errors import StaleVersion
from kvd_shared.lease import RPC_SOCKET
from kvd_shared.rpc import RpcCodec
from tests.benchmarks.harness import Report, Row
from tests.chaos.fuzz_frames import Messages
from tests.chaos.fuzz_lease import LeaseFaults
from tests.chaos.fuzz_restart import Restart
from tests.chaos.watch import Watch, process_use, until_fds
from tests.chaos.world import ChaosDaemon, chaos_daemon
from tests.daemon import child_environment, eventually
from tests.integration.bad_frames import NAMESPACE
from tests.integration.daemon_state import state

NAME = "fuzz"
WINDOW = 64  # messages under way
STALLED_MS = 2_000  # without an answer; then somebody else says something
ANSWER_MS = 3_000
UNANSWERED = "unanswered"
GRACE_S = 1.5  # after a restart; until then nothing that was cached is evicted
WARM_BLOCKS = 50  # then memory is looked at for the first time
MOST_GROWTH_BYTES = 5 << 20
# A session of another process: its token must be worth nothing here.
_OTHER = """\
import ctypes, sys; ctypes.CDLL(None).prctl(1, 9)
from pathlib import Path
from kvd_shared.client import KvdClient
client = KvdClient.attach(Path(sys.argv[1]), name="other")
print(client._codec._token.hex(), flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`first_block`: where a run goes on that was stopped. `progress`: where it says how far it is,
    for the next one to read."""

    seed: int = 1
    messages: int = 1_000_000
    block: int = 2_000
    first_block: int = 0
    restarts: int = 20  # of the daemon, one at the end of each of the first blocks
    lease_share: float = 0.04
    num_pages: int = 40
    progress: Path | None = None

    @property
    def num_blocks(self) -> int:
        return -(-self.messages // self.block)


def play(report: Report, plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        program = ("-m", "tests.chaos.watched", str(folder / "findings"))
        with chaos_daemon(
            folder,
            num_pages=plan.num_pages,
            page_size=8,
            program=program,
            keeper=True,
            daemon_settings=f"resume_grace_s = {GRACE_S}\n",
        ) as daemon:
            _Run(report, plan, daemon, folder / "findings").play()


class _Run:
    def __init__(self, report: Report, plan: Plan, daemon: ChaosDaemon, findings: Path) -> None:
        self._report, self._plan, self._daemon = report, plan, daemon
        self._findings = findings
        self._codes: Counter[str] = Counter()
        self._lease: Counter[str] = Counter()
        self._changed = 0  # blocks of refused messages behind which something was different
        self._sent = 0
        self._stalled = 0
        self._early_ok = self._resumed = 0

    def play(self) -> None:
        plan, daemon = self._plan, self._daemon
        warm: dict[str, int] | None = None
        first_of_life = max(plan.first_block, plan.restarts)
        warm_blocks = max(1, min(WARM_BLOCKS, (plan.num_blocks - first_of_life) // 2))
        with self._other() as other:
            for block in range(plan.first_block, plan.num_blocks):
                rng = Random(plan.seed * 1_000_003 + block)
                with (
                    daemon.attach("looks on", "admin") as self._admin,
                    self._dealer(),  # one that errs too often is not answered
                ):
                    messages = self._block(block, rng, other)
                if block < plan.restarts:
                    self._restart(rng, messages)
                if block - first_of_life + 1 == warm_blocks:
                    warm = process_use(daemon.served_by)
                if plan.progress is not None:
                    plan.progress.write_text(json.dumps({"seed": plan.seed, "next": block + 1}))
                if block % 25 == 24:
                    self._report.say(f"{self._sent:,} messages, {len(self._found())} findings")
            warm = warm or process_use(daemon.served_by)
            use = until_fds(daemon.served_by, warm["fds"])
        with daemon.attach("checks", "admin") as admin:
            Watch(admin).audit()
        self._rows(warm, use)

    def _restart(self, rng: Random, messages: Messages) -> None:
        restart = Restart(self._daemon, rng, self._dealer, self._pipeline)
        restart.play(messages)
        self._early_ok += restart.early_ok
        self._resumed += restart.resumed
        self._lease += restart.lease
        self._until_gone("mutant")
        with self._daemon.attach("checks", "admin") as admin:
            watch = Watch(admin)
            watch.audit()
            eventually(lambda: self._nobodys_pages(watch) == self._plan.num_pages, 10.0)

    def _nobodys_pages(self, watch: Watch) -> int:
        """Free, or to be evicted."""
        pool = watch.pool()
        return int(pool["counts"]["free"] + pool["counts"]["cached"])

    def _block(self, block: int, rng: Random, other: bytes) -> Messages:
        """A third is nobody's, and is refused whatever it says; the rest is a session's own."""
        messages = Messages(rng)
        with self._daemon.attach("ended") as ended:
            gone = ended._codec._token
        tokens = [other, gone, b"", bytes(16), rng.randbytes(16), rng.randbytes(4096)]
        number = self._plan.block
        nobodys = [messages.nobodys(tokens) for _ in range(number // 3)]
        for _ in range(3):  # what expires meanwhile, expires once
            before = state(self._admin)
            codes = self._pipeline(iter(nobodys))
            if not codes["OK"] and state(self._admin) == before:
                break
        else:
            self._changed += 1
        self._lease_faults(rng, other, int(number * self._plan.lease_share))
        with self._daemon.attach("mutant") as worker, self._daemon.attach(
            "mutant's admin", "admin"
        ) as admin:  # fmt: skip
            messages.held = worker.call(verbs.allocate(9)).tolist()
            messages.request = worker.call(verbs.begin(3))
            with suppress(StaleVersion):  # a mutant of an earlier block has raised everybody's
                worker.call(verbs.publish(NAMESPACE, [0] * 24, messages.held[:3]))
            messages.handles = [worker.call(verbs.open_sequence(NAMESPACE, [0] * 20))[0]]
            for _ in range(number * 2 // 3 // WINDOW):
                self._pipeline(messages.live(worker._codec, admin._codec) for _ in range(WINDOW))
        for name in ("mutant", "mutant's admin"):
            self._until_gone(name)
        return messages

    def _pipeline(self, messages: Iterator[list[bytes]]) -> Counter[str]:
        """Send all, with at most WINDOW unanswered; every one has to be answered."""
        codes: Counter[str] = Counter()
        under_way = 0
        for frames in messages:
            self._socket.send_multipart(frames)
            self._sent += 1
            under_way += 1
            if under_way == WINDOW:
                codes[self._answer()] += 1
                under_way -= 1
        for _ in range(under_way):
            codes[self._answer()] += 1
        self._codes += codes
        return codes

    def _answer(self) -> str:
        while True:
            if not self._socket.poll(STALLED_MS):
                self._stalled += 1
                self._daemon.counts()
                if not self._socket.poll(ANSWER_MS):
                    return UNANSWERED
            answer = msgpack.unpackb(self._socket.recv_multipart()[0])
            if "notice" not in answer:
                return str(answer["error"]["code"]) if "error" in answer else "OK"

    def _lease_faults(self, rng: Random, other: bytes, count: int) -> None:
        faults = LeaseFaults(rng, self._daemon.socket_dir, other)
        for _ in range(count):
            self._lease[faults.one()] += 1
            self._sent += 1
        for token in faults.accepted:
            _, frames = RpcCodec(token).request(verbs.detach())
            self._socket.send_multipart(frames)
            self._answer()

    def _until_gone(self, name: str) -> None:
        """A mutant can have become a `detach`: then it is gone already."""
        eventually(lambda: name not in self._daemon.sessions(), 10.0)

    def _found(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._findings.read_text().splitlines()]

    @contextmanager
    def _dealer(self) -> Iterator[zmq.Socket[bytes]]:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{self._daemon.socket_dir / RPC_SOCKET}")
        self._socket = dealer
        yield dealer
        dealer.close()
        context.term()

    @contextmanager
    def _other(self) -> Iterator[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _OTHER, str(self._daemon.socket_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
        )
        assert process.stdout is not None
        yield bytes.fromhex(process.stdout.readline().decode())
        process.kill()
        process.wait()

    def _rows(self, warm: dict[str, int], use: dict[str, int]) -> None:
        add, found = self._report.add, self._found()
        refused = sum(self._codes.values()) - self._codes["OK"] - self._codes[UNANSWERED]
        self._report.extra |= {"answers": dict(self._codes), "lease_answers": dict(self._lease),
                               "findings": found[:20]}  # fmt: skip
        add(Row(name="messages", value=self._sent, unit=""))
        add(Row(name="refused", value=refused, unit=""))
        add(Row(name="refused messages that changed something, and bugs", value=len(found),
                unit="", target=0))  # fmt: skip
        add(Row(name="tracebacks in the daemon's log", unit="", target=0,
                value=self._daemon.text().count("Traceback")))  # fmt: skip
        add(Row(name="blocks of nobody's messages that changed something", value=self._changed,
                unit="", target=0))  # fmt: skip
        add(Row(name="sessions resumed among faults", value=self._resumed, unit=""))
        add(Row(name="requests done before their session had resumed", value=self._early_ok,
                unit="", target=0))  # fmt: skip
        add(Row(name="messages without an answer", value=self._codes[UNANSWERED], unit="",
                target=0))  # fmt: skip
        add(Row(name="messages that were answered only after another one came",
                value=self._stalled - self._codes[UNANSWERED], unit="", target=0))  # fmt: skip
        grown = (use["rss_bytes"] - warm["rss_bytes"]) / 2**20
        add(Row(name="memory of the daemon, more than after warming up", unit="MiB",
                value=round(grown, 2), target=MOST_GROWTH_BYTES / 2**20))  # fmt: skip
        add(Row(name="fds of the daemon, more than after warming up", unit="",
                value=use["fds"] - warm["fds"], target=0))  # fmt: skip
