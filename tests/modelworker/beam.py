"""Beam search over pages of a daemon: beams share what they have in common, and whoever writes into
a page that others hold copies it first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.layout import pages_needed
from kvd_shared.refs import page_ids
from modelworker.runner import ModelRunner, SequenceChunk


@dataclass(slots=True)
class Beam:
    """Invariant: the session holds each of `refs` once for this beam; all tokens but the last have
    their K and V there."""

    tokens: list[int]
    score: float  # sum of the log-probabilities of what was chosen
    refs: list[int]

    @property
    def block_table(self) -> list[int]:
        table: list[int] = page_ids(np.array(self.refs, dtype=np.int64)).tolist()
        return table


class BeamSearch:
    """`parents[i]`: how many different beams went on in step i. `num_copied`: pages."""

    def __init__(self, client: KvdClient, runner: ModelRunner, width: int) -> None:
        self._client = client
        self._runner = runner
        self._page_size = runner.pool.layout.page_size
        self._width = width
        self._request = client.call(verbs.begin())
        self.parents: list[int] = []
        self.num_copied = 0

    def run(self, prompt: list[int], num_tokens: int) -> list[Beam]:
        """The best beams after so many tokens, best first. They are held until `free`."""
        pages = pages_needed(len(prompt), self._page_size)
        refs = self._client.call(verbs.allocate(pages, self._request)).tolist()
        root = Beam(list(prompt), 0.0, refs)
        chunk = SequenceChunk(prompt, 0, root.block_table, wants_logits=True)
        beams = self._choose([root], self._runner.run([chunk]))
        for _ in range(num_tokens - 1):
            for beam in beams:
                self._make_room(beam)
            chunks = [
                SequenceChunk(b.tokens[-1:], len(b.tokens) - 1, b.block_table, wants_logits=True)
                for b in beams
            ]
            beams = self._choose(beams, self._runner.run(chunks))
        return beams

    def free(self, beams: list[Beam]) -> None:
        for beam in beams:
            self._client.call(verbs.free(beam.refs))
        self._client.call(verbs.end(self._request))

    def _choose(self, beams: list[Beam], logits: torch.Tensor) -> list[Beam]:
        """The best continuations; they take over their parents' pages, and the parents are gone."""
        scores = torch.tensor([[beam.score] for beam in beams]) + logits.log_softmax(dim=-1)
        best, places = scores.flatten().topk(self._width)
        chosen = []
        for score, place in zip(best.tolist(), places.tolist(), strict=True):
            row, token = divmod(place, logits.shape[1])
            parent = beams[row]
            self._client.call(verbs.share(parent.refs))
            chosen.append(Beam([*parent.tokens, token], score, list(parent.refs)))
        for beam in beams:
            self._client.call(verbs.free(beam.refs))
        self.parents.append(len({place // logits.shape[1] for place in places.tolist()}))
        return chosen

    def _make_room(self, beam: Beam) -> None:
        """A page that is the beam's alone, for the K and V of its last token."""
        if len(beam.tokens) > len(beam.refs) * self._page_size:
            beam.refs += self._client.call(verbs.allocate(1, self._request)).tolist()
            return
        old = beam.refs[-1]
        new = self._client.call(verbs.make_writable(old, self._request))
        if new != old:
            self._runner.copy_pages([(old, new)])
            self.num_copied += 1
            beam.refs[-1] = new
            self._client.call(verbs.free([old]))
