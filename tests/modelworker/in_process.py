"""Workers and a cache in one process, without sockets, threads and a model: every step is the
test's to take."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from kvd_shared.client import KvdClient
from kvd_shared.errors import DaemonUnreachable
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import PoolOffer
from kvd_shared.refs import page_of
from modelworker.attachment import Attachment
from modelworker.engine import WorkerEngine
from modelworker.engine_options import EngineOptions
from modelworker.requests import Delta, Event, Failed, Finished, GenerationRequest, SamplingParams
from modelworker.runner import ModelRunner, SequenceChunk
from modelworker.scheduler import Limits
from modelworker.tokenizer import Tokenizer
from tests.modelworker.host import NOTHING, Client, Host

VOCAB = 50


def next_token(context: Sequence[int]) -> int:
    """What the pretended model answers: it depends on every token, and on their order."""
    return zlib.crc32(np.asarray(context, dtype="<i8").tobytes()) % VOCAB


def greedy(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The only right answer."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Runner:
    """Stands for ModelRunner: writes its tokens into their slots, then reads the whole context."""

    def __init__(self, host: Host, client: Client) -> None:
        self._slots = host.slots
        self._page_size = host.cache.page_size
        self._client = client
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
            if NOTHING in context:  # what a fenced one reads is anybody's
                assert self._client.fenced, "a slot was read that nobody has written"
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
        self.events: dict[str, list[Event]] = {}
        self._host, self._name = host, name
        options = EngineOptions(
            model="m",
            context_len=10_000,
            vocab_size=VOCAB,
            limits=limits or Limits(),
            weights_version=weights_version,
        )
        self.engine = WorkerEngine(self._attach, tokenizer, options, self._attach())

    def _attach(self) -> Attachment:
        host = self._host
        if not host.is_up:
            raise DaemonUnreachable("there is no daemon")
        self.client = host.client(self._name)
        self.runner = Runner(host, self.client)
        layout = PoolLayout(
            num_layers=1,
            num_kv_heads=1,
            head_dim=8,
            page_size=host.cache.page_size,
            dtype="float32",
        )
        offer = PoolOffer(
            name="default",
            pool_id=host.pool_id,
            layout=layout,
            num_pages=host.cache.num_pages,
            model=None,
            chunk_bytes=[],
        )
        stand_ins = cast(KvdClient, self.client), offer, cast(ModelRunner, self.runner)
        return Attachment(*stand_ins)

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
        self.engine.turn()

    @property
    def busy(self) -> bool:
        health = self.engine.health()
        return bool(health["running"] or health["waiting"] or health["status"] == "away")


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
