"""Every operation of the cache core, timed for prompts of one length in one kind of garden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.benchmarks.timing import Stopwatch, Timing
from tests.benchmarks.workload import PAGE_SIZE, PAGE_TOKEN_BYTES, Garden, Tokens, copied

COLD_ROUNDS = {1024: 16, 8192: 8, 32768: 4, 131072: 1}  # a batch, by tokens: as room allows
ROUNDS = 15  # a batch, of operations that leave nothing behind
SPARE_PAGES = ROUNDS + 1  # of a document behind where partial matches end

MakeGarden = Callable[[int], Garden]  # with room for so many pages


class Suite:
    """Times all operations for prompts of one length; a batch is the same in every garden."""

    def __init__(self, num_tokens: int, make: MakeGarden) -> None:
        self.pages = num_tokens // PAGE_SIZE
        self._cold_rounds = COLD_ROUNDS[num_tokens]
        self._make = make
        self._watches: dict[str, Stopwatch] = {}

    def timings(self) -> dict[str, Timing]:
        return {name: watch.timing() for name, watch in self._watches.items()}

    def batch(self, seed: int) -> None:
        for watch in self._watches.values():
            watch.batch()
        tokens = Tokens(seed)
        self._whole(self._make(self.pages), tokens)
        self._partial(self._make(self.pages + SPARE_PAGES), tokens)
        self._cold(self._make(self._cold_rounds * self.pages), tokens)

    def _whole(self, garden: Garden, tokens: Tokens) -> None:
        document = garden.head + tokens.pages(self.pages)
        garden.store(document)
        prompt = copied(document) + tokens.take(1)
        for _ in range(ROUNDS):
            self._match(garden, "match, warm", prompt, "free, warm")
        prompt = copied(document) + tokens.pages(4)
        for _ in range(ROUNDS):
            self._match(garden, "match to a node's end", prompt)
        for _ in range(ROUNDS):
            self._match(garden, "match, cold", garden.head + tokens.pages(self.pages))

    def _partial(self, garden: Garden, tokens: Tokens) -> None:
        document = garden.head + tokens.pages(self.pages + SPARE_PAGES)
        garden.store(document)
        half = PAGE_TOKEN_BYTES // 2
        other = tokens.pages(1)
        for spare in range(1, SPARE_PAGES):  # each ends where none has ended before
            end = len(document) - spare * PAGE_TOKEN_BYTES
            prompt = copied(document[: end - half]) + other
            self._match(garden, "match inside an edge", prompt, "free inside an edge")
        for _ in range(ROUNDS):
            self._match(garden, "match inside an edge, again", prompt)
        for _ in range(ROUNDS):
            self._match(garden, "match and the page that goes on", prompt, min_partial=1)
        prompt = copied(document[: len(garden.head) + half]) + other
        for _ in range(ROUNDS):
            self._match(garden, "match inside a first page", prompt, min_partial=1)

    def _cold(self, garden: Garden, tokens: Tokens) -> None:
        for _ in range(self._cold_rounds):
            prompt = garden.head + tokens.pages(self.pages)
            refs = self._time("acquire, cold", garden.acquire, prompt)
            self._time("publish", garden.publish, prompt, refs)
            self._time("free", garden.free, refs)
        for _ in range(ROUNDS):
            page = self._time("allocate 1 page", garden.allocate, 1)
            self._time("free 1 page", garden.free, page)
        for _ in range(ROUNDS):
            self._time("evict 1 page", garden.evict, 1)

    def _match(
        self,
        garden: Garden,
        name: str,
        prompt: bytes,
        free: str | None = None,
        min_partial: int | None = None,
    ) -> None:
        found = self._time(name, garden.match, prompt, min_partial)
        if free is not None:
            self._time(free, garden.free, found.refs)
            found.refs = b""
        garden.let_go(found)

    def _time(self, name: str, what: Callable[..., Any], *args: Any) -> Any:
        if name not in self._watches:
            self._watches[name] = Stopwatch()
        return self._watches[name].time(what, *args)
