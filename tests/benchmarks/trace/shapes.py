"""Generated traces of other shapes than a conversation's: what a policy must not spoil.

A prompt is a path: a topic's shared blocks, then those of one document, then some that nobody
else has. All are seeded, and one request comes each second.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.benchmarks.trace.request import Request, Trace

TOPIC_BLOCKS, DOCUMENT_BLOCKS, OWN_BLOCKS = 3, (1, 8), (0, 2)
DOCUMENTS_A_TOPIC = 20


@dataclass
class Library:
    """Documents by number, each a path of blocks; made when first asked for."""

    random: random.Random
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _topics: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _documents: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def prompt(self, document: int) -> tuple[int, ...]:
        if document not in self._documents:
            topic = document // DOCUMENTS_A_TOPIC
            if topic not in self._topics:
                self._topics[topic] = self._new(TOPIC_BLOCKS)
            size = self.random.randint(*DOCUMENT_BLOCKS)
            self._documents[document] = self._topics[topic] + self._new(size)
        return self._documents[document] + self._new(self.random.randint(*OWN_BLOCKS))

    def _new(self, count: int) -> tuple[int, ...]:
        return tuple(itertools.islice(self._numbers, count))


def zipf(seed: int, num_requests: int) -> Trace:
    """Few documents are asked for often, many seldom, and that never changes."""
    rng = random.Random(seed)
    return _requests(rng, iter(_popular(rng, 2000, num_requests)))


def loop(seed: int, num_requests: int) -> Trace:
    """The same documents in the same order, again and again."""
    rng = random.Random(seed)
    return _requests(rng, (i % 400 for i in range(num_requests)))


def drift(seed: int, num_requests: int) -> Trace:
    """What is popular moves on slowly: each document is for a while."""
    rng = random.Random(seed)
    ranks = _popular(rng, 500, num_requests)
    return _requests(rng, (rank + i // 10 for i, rank in enumerate(ranks)))


def phases(seed: int, num_requests: int) -> Trace:
    """Three times, all at once, other documents become the popular ones."""
    rng = random.Random(seed)
    ranks = _popular(rng, 1000, num_requests)
    return _requests(rng, (rank + i * 4 // num_requests * 1000 for i, rank in enumerate(ranks)))


SHAPES: dict[str, Callable[[int, int], Trace]] = {
    "zipf": zipf,
    "loop": loop,
    "drift": drift,
    "phases": phases,
}


def _popular(rng: random.Random, count: int, num_requests: int) -> list[int]:
    """Numbers below `count`, drawn by Zipf's law with exponent 0.9, shuffled among topics."""
    order = list(range(count))
    rng.shuffle(order)
    weights = [1 / (rank + 1) ** 0.9 for rank in range(count)]
    return rng.choices(order, weights, k=num_requests)


def _requests(rng: random.Random, documents: Iterator[int]) -> Trace:
    library = Library(rng)
    return [Request(float(at), library.prompt(d)) for at, d in enumerate(documents)]
