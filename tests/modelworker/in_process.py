"""Workers and a cache in one process, without sockets, threads and a model: every step is the
test's to take."""

from __future__ import annotations

import random
import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from kvd.arguments import Arguments
from kvd.cache import NO_OPTIONS, CacheManager
from kvd.cache_check import check_cache
from kvd.operations import step
from kvd.options import CacheOptions
from kvd.session import Session
from kvd_shared.calls import Call
from kvd_shared.client import KvdClient
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import PoolOffer
from kvd_shared.refs import page_of
from kvd_shared.rpc import Notice
from kvd_shared.wire import FrameWriter
from modelworker.attachment import Attachment
from modelworker.engine import EngineOptions, WorkerEngine
from modelworker.requests import Delta, Event, Failed, Finished, GenerationRequest, SamplingParams
from modelworker.runner import ModelRunner, SequenceChunk
from modelworker.scheduler import Limits
from modelworker.tokenizer import Tokenizer

T = TypeVar("T")
VOCAB = 50
NOTHING = -1  # in a slot that nobody has written


def next_token(context: Sequence[int]) -> int:
    """What the pretended model answers: it depends on every token, and on their order."""
    return zlib.crc32(np.asarray(context, dtype="<i8").tobytes()) % VOCAB


def greedy(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The only right answer."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Host:
    """A pool whose slots hold tokens in place of K and V, and its cache."""

    def __init__(self, num_pages: int, page_size: int, options: CacheOptions = NO_OPTIONS) -> None:
        self.cache = CacheManager(num_pages, page_size, options)
        self.slots = np.full((num_pages, page_size), NOTHING, dtype=np.int64)
        self.clients: list[Client] = []
        self._refs = self._current()  # each page's, when it was last looked

    def client(self, name: str) -> Client:
        """A session of its own."""
        self.clients.append(Client(self, len(self.clients) + 1, name))
        return self.clients[-1]

    def spoil_freed(self) -> None:
        """A page that became free is somebody else's, for all that its last holder can know."""
        refs = self._current()
        self.slots[refs != self._refs] = NOTHING
        self._refs = refs

    def _current(self) -> npt.NDArray[np.int64]:
        current = self.cache.free_list.current
        return np.array([current(page) for page in range(self.cache.num_pages)])

    def pass_on_notices(self) -> None:
        notices, self.cache.notices = self.cache.notices, []
        for kind, request, tokens in notices:
            for client in self.clients:
                if client.session is request.session:
                    client.noticed.append(Notice(kind, request.number, tokens))

    def check(self) -> None:
        check_cache(self.cache)


class Client:
    """Stands for KvdClient; `calls` counts the operations by name."""

    def __init__(self, host: Host, number: int, name: str) -> None:
        self.alive = True
        self.noticed: deque[Notice] = deque()
        self.calls: Counter[str] = Counter()
        self._host = host
        self._number = number
        self.session: Session = host.cache.open_session(number, name, 0.0)

    def call(self, call: Call[T]) -> T:
        """A step, through its wire form."""
        writer = FrameWriter()
        wire = call.to_wire(writer)
        frames = [b"", *writer.frames]
        self.calls.update(entry["op"] for entry in wire["args"]["calls"])
        args, now = Arguments("step", wire["args"], frames), time.monotonic()
        slices = step(self._host.cache, self.session, args, frames, now)
        while True:
            try:
                next(slices)
            except StopIteration as end:
                results = end.value["results"]
                break
        self._host.spoil_freed()
        self._host.pass_on_notices()
        return call.read({"results": results}, [b""])

    def notices(self) -> list[Notice]:
        taken = list(self.noticed)
        self.noticed.clear()
        return taken

    def close(self) -> None:
        """Everything that the session holds comes back, as when its process dies."""
        if self.alive:
            self.alive = False
            cache = self._host.cache
            cache.release_session(self.session)
            while cache.sweep(time.monotonic()):
                pass
            self._host.spoil_freed()
            self._host.pass_on_notices()


class Runner:
    """Stands for ModelRunner: writes its tokens into their slots, then reads the whole context."""

    def __init__(self, host: Host) -> None:
        self._slots = host.slots
        self._page_size = host.cache.page_size
        self.batches: list[list[int]] = []  # tokens computed of each sequence, step by step
        self.num_copied = 0  # pages

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.num_copied += len(pairs)
        for source, target in pairs:
            self._slots[page_of(target)] = self._slots[page_of(source)]

    @property
    def num_computed(self) -> int:
        """Tokens, in all."""
        return sum(map(sum, self.batches))

    def run(self, chunks: Sequence[SequenceChunk]) -> torch.Tensor:
        self.batches.append([len(chunk.token_ids) for chunk in chunks])
        wanted = []
        for chunk in chunks:
            stop = chunk.start + len(chunk.token_ids)
            positions = np.arange(stop)
            pages = np.asarray(chunk.block_table)[positions // self._page_size]
            offsets = positions % self._page_size
            new = slice(chunk.start, stop)
            self._slots[pages[new], offsets[new]] = chunk.token_ids
            context = self._slots[pages, offsets]
            assert NOTHING not in context, "a slot was read that nobody has written"
            if chunk.wants_logits:
                wanted.append(next_token(context.tolist()))
        return torch.nn.functional.one_hot(torch.tensor(wanted, dtype=torch.long), VOCAB).float()


class Worker:
    """A WorkerEngine over a host's pool. `events` are what each request was told."""

    def __init__(
        self,
        host: Host,
        tokenizer: Tokenizer,
        name: str = "worker",
        limits: Limits | None = None,
        weights_version: int = 0,
    ) -> None:
        self.client = host.client(name)
        self.runner = Runner(host)
        self.events: dict[str, list[Event]] = {}
        layout = PoolLayout(
            num_layers=1,
            num_kv_heads=1,
            head_dim=8,
            page_size=host.cache.page_size,
            dtype="float32",
        )
        offer = PoolOffer(
            name="default",
            pool_id="0",
            layout=layout,
            num_pages=host.cache.num_pages,
            model=None,
            chunk_bytes=[],
        )
        stand_ins = cast(KvdClient, self.client), offer, cast(ModelRunner, self.runner)
        attached = Attachment(*stand_ins)
        options = EngineOptions(
            model="m",
            context_len=10_000,
            vocab_size=VOCAB,
            limits=limits or Limits(),
            weights_version=weights_version,
        )
        self.engine = WorkerEngine(lambda: attached, tokenizer, options, attached)

    def submit(
        self, request_id: str, prompt: Sequence[int], max_tokens: int, **options: Any
    ) -> list[Event]:
        """Returns the list that its events will be in. Greedy."""
        params = options.pop("params", SamplingParams(max_tokens=max_tokens, temperature=0))
        request = GenerationRequest(
            request_id=request_id, prompt_ids=tuple(prompt), params=params, **options
        )
        events = self.events[request_id] = []
        self.engine.submit(request, events.append)
        return events

    def step(self) -> None:
        self.engine.step()

    @property
    def busy(self) -> bool:
        health = self.engine.health()
        return bool(health["running"] or health["waiting"])


def tokens_of(events: Sequence[Event], index: int = 0) -> list[int]:
    """The tokens of one continuation so far."""
    mine = [e for e in events if isinstance(e, Delta) and e.index == index]
    return [token for delta in mine for token in delta.token_ids]


def finished(events: Sequence[Event]) -> list[Finished]:
    assert not any(isinstance(e, Failed) for e in events), events
    return [e for e in events if isinstance(e, Finished)]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def run(*workers: Worker, steps: int = 1000) -> None:
    """Step all in turn until none has anything to do."""
    for _ in range(steps):
        if not any(worker.busy for worker in workers):
            for worker in workers * 2:  # the last publish, then what it found to be double
                worker.step()
            return
        for worker in workers:
            worker.step()
    raise AssertionError(f"still busy after {steps} steps: {workers[0].engine.health()}")


def check_idle(host: Host) -> None:
    """Nothing is held, nothing is queued: free and cached pages are all there are."""
    host.check()
    assert host.cache.num_available == host.cache.num_pages
    assert host.cache.queue.counts() == (0, 0)
