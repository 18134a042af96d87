"""Requests with the lengths and the shared prefixes of a real trace, scaled to the small model.

The trace is Mooncake's (Qin et al., FAST '25): one hour of a chat service; a line is a request
with `input_length`, `output_length` and `hash_ids`, one for each 512 tokens of the prompt, equal
where the prompts are equal from the start.

Every length is divided by SCALE, so that 512 tokens become two pages of 16. A conversation is what
has the second 512 tokens in common (all requests share the first). A sample takes whole
conversations and keeps the order of the trace.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.benchmarks.claims.plan import Ask

SCALE = 16  # the model's 2,048 tokens stand for a service with a context of 32,768
CONTEXT = 2048
BLOCK = 512  # tokens of the trace that a hash id stands for
MAX_TOKENS = 2000 // SCALE  # the trace's own limit: none of its outputs is longer
FIRST_TOKEN, VOCABULARY = 2, 512  # of tiny-quote; before them its two special ones
QUOTE = 1  # its token <|quote|>: what follows is to be continued as it stands in the document
CUE = 8  # tokens of it


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


# Of the trace, for where it is not there: each 5 % of the lengths, and how many conversations have
# 1, 2, ... turns (the 65 with more than eight are left out).
INPUTS = _numbers(
    "891 901 964 1261 1662 2306 3263 4251 4993 5870 6909 8186 9570 11237 13196 15367 17869 21464 "
    "27367 39550 126195"
)
OUTPUTS = _numbers(
    "1 10 24 46 100 156 213 256 291 322 350 375 399 423 447 472 504 543 597 698 2000"
)
TURNS = (5114, 1311, 464, 200, 117, 55, 27, 26)


@dataclass(frozen=True, slots=True)
class Request:
    """A line of the trace, lengths in its own tokens."""

    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """A service of this context would refuse the others."""
        return self.input_length + self.output_length <= CONTEXT * SCALE


def read_trace(path: Path) -> list[Request]:
    """Raises ValueError that names the line where it can't be read."""
    requests = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            fields = json.loads(line)
            ids = tuple(fields["hash_ids"])
            requests.append(Request(fields["input_length"], fields["output_length"], ids))
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}, line {number}: {e!r}; see this module for the format") from e
    return requests


def made_up(num_conversations: int = 4000, seed: int = 0) -> list[Request]:
    """Conversations with the trace's lengths and turns; a turn's prompt begins as the one before
    it. They come one after the other."""
    random = np.random.default_rng(seed)
    weights = np.array(TURNS) / sum(TURNS)
    points = np.linspace(0, 1, len(INPUTS))
    requests, next_id = list[Request](), 1
    for turns in random.choice(np.arange(1, len(TURNS) + 1), num_conversations, p=weights):
        inputs = np.sort(np.interp(random.random(turns), points, INPUTS).astype(int)).tolist()
        outputs = np.interp(random.random(turns), points, OUTPUTS).astype(int).tolist()
        ids = [0]
        for length, output in zip(inputs, outputs, strict=True):
            whole, blocks = length // BLOCK, -(-length // BLOCK)
            ids = ids[:whole] + list(range(next_id, next_id + blocks - min(whole, len(ids))))
            next_id += blocks
            requests.append(Request(length, output, tuple(ids)))
    return requests


def sample(requests: Sequence[Request], num_requests: int, seed: int) -> list[Request]:
    """At least that many requests: random conversations, whole, as far as a turn fits."""
    conversations: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        if request.fits:
            conversations.setdefault(request.hash_ids[:2], []).append(i)
    order = list(conversations.values())
    chosen: list[int] = []
    for which in np.random.default_rng(seed).permutation(len(order)).tolist():
        if len(chosen) >= num_requests:
            break
        chosen += order[which]
    return [requests[i] for i in sorted(chosen)]


def to_asks(requests: Iterable[Request], seed: int) -> list[Ask]:
    """What the small model is asked: random tokens, the same for the same hash id, and at the end
    a cue from somewhere among them, which it goes on to quote."""
    asks = []
    for request in requests:
        blocks = [_block(seed, i) for i in request.hash_ids]
        document = np.concatenate(blocks)[: round(request.input_length / SCALE) - 1 - CUE]
        num_tokens = max(1, round(request.output_length / SCALE))
        random = np.random.default_rng((seed, *request.hash_ids))
        asks.append(Ask(with_cue(document, num_tokens, random), num_tokens))
    return asks


def with_cue(document: np.ndarray, num_tokens: int, random: np.random.Generator) -> tuple[int, ...]:
    """The document and a cue, after which `num_tokens` more follow in it, where it is so long."""
    at = random.integers(max(1, len(document) - CUE - num_tokens))
    return (*document.tolist(), QUOTE, *document[at : at + CUE].tolist())


def endless_cache(asks: Sequence[Ask], page_size: int) -> float:
    """The share of the prompts' tokens that a cache without limits would find: whole pages, and
    never a prompt's last token."""
    seen = set[tuple[int, ...]]()
    found = 0
    for ask in asks:
        pages = range(page_size, len(ask.prompt), page_size)
        known = [end for end in pages if ask.prompt[:end] in seen]
        found += max(known, default=0)
        seen.update(ask.prompt[:end] for end in range(page_size, len(ask.prompt) + 1, page_size))
    return found / sum(len(ask.prompt) for ask in asks)


def _block(seed: int, hash_id: int) -> np.ndarray:
    random = np.random.default_rng((seed, hash_id))
    return random.integers(FIRST_TOKEN, VOCABULARY, BLOCK // SCALE)
