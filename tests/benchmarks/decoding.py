"""Sequences that decode together, as a worker's step tells kvd of them: one call for all."""

from __future__ import annotations

import numpy as np

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.refs import TokenIds
from tests.benchmarks.timing import Stopwatch
from tests.benchmarks.workload import NAMESPACE, PAGE_SIZE, Tokens

AT_ONCE = 16  # opened or closed


class Decoding:
    """Server-side sequences, each one token longer with every step.

    Their prompts have all lengths modulo the page size: in a usual step one in 16 fills a page,
    which is published, and gets the next.
    """

    def __init__(self, client: KvdClient, count: int, seed: int = 1) -> None:
        self._client = client
        self._tokens = Tokens(seed)
        self._lengths = np.array([200 + i % PAGE_SIZE for i in range(count)], dtype=np.int32)
        self._handles = np.zeros(count, dtype=np.int64)
        for start in range(0, count, AT_ONCE):
            some = slice(start, start + AT_ONCE)
            prompts = [self._take(int(n)) for n in self._lengths[some]]
            opened = client.call(verbs.step([verbs.open_sequence(NAMESPACE, p) for p in prompts]))
            self._handles[some] = [handle for handle, _ in opened]
            self._extend(np.zeros(len(prompts), dtype=np.int32), some=some)  # prefilled

    def step(self, watch: Stopwatch | None = None) -> None:
        """One token more of each, in one round trip."""
        self._extend(np.ones(len(self._handles), dtype=np.int32), watch)

    def align(self) -> None:
        """Bring all to where each of them fills a page with the next step."""
        self._extend(-self._lengths % PAGE_SIZE)

    def close(self) -> None:
        for start in range(0, len(self._handles), AT_ONCE):
            self._client.call(verbs.close_sequences(self._handles[start : start + AT_ONCE]))

    def _extend(
        self, more: TokenIds, watch: Stopwatch | None = None, some: slice = slice(None)
    ) -> None:
        """What was there is computed, and `more` tokens follow."""
        handles, computed = self._handles[some], self._lengths[some]
        call = verbs.extend(handles, computed, more, self._take(int(more.sum())))
        done = self._client.call(call) if watch is None else watch.time(self._client.call, call)
        if set(done.status) != {"OK"}:
            raise RuntimeError(f"a step was refused: {set(done.status)}")
        self._lengths[some] = computed + more

    def _take(self, count: int) -> TokenIds:
        return np.frombuffer(self._tokens.take(count), dtype="<i4")
