"""The paged path against transformers, in float32, on folders that transformers wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kvd_shared.model_folder import read_model_folder
from modelworker.model import Model, load_model
from modelworker.pool_view import PoolView
from modelworker.runner import ModelRunner, SequenceChunk, build_batch
from tests.modelworker import tiny_models

TOLERANCE = 1e-4  # of the range of transformers' logits
PAGE_SIZE = 16
NUM_PAGES = 64
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Pair:
    """The same weights twice, and a runner over a NaN-filled pool with scattered pages."""

    oracle: Any
    model: Model
    runner: ModelRunner
    free: list[int]

    def pages(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def logits(self, chunks: Sequence[SequenceChunk]) -> torch.Tensor:
        """Logits of every token, float32[T, vocab]."""
        batch = build_batch(chunks, PAGE_SIZE)
        every = torch.arange(len(batch.token_ids))
        return self.model.forward(replace(batch, logits_at=every), self.runner.pool)

    def prefill(self, prompt: list[int], start: int, table: list[int], chunk: int) -> torch.Tensor:
        """Logits of the tokens from `start` on, computed `chunk` at a time."""
        return torch.cat(
            [
                self.logits([SequenceChunk(prompt[at : at + chunk], at, table, True)])
                for at in range(start, len(prompt), chunk)
            ]
        )

    @torch.no_grad()
    def truth(self, prompt: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.oracle(torch.tensor([prompt])).logits[0]
        return logits


@pytest.fixture(scope="module", params=list(tiny_models.FAMILIES))
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Model, Any]:
    oracle = tiny_models.make(request.param)
    shards = request.param in ("llama-gqa", "qwen3")
    folder = tiny_models.save(oracle, tmp_path_factory.mktemp(request.param), shards=shards)
    return oracle, load_model(folder, torch.float32), read_model_folder(folder).layout(PAGE_SIZE)


@pytest.fixture
def pair(loaded: tuple[Any, Model, Any]) -> Pair:
    oracle, model, layout = loaded
    order = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0)).tolist()
    return Pair(oracle, model, ModelRunner(model, PoolView.private(layout, NUM_PAGES)), order)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    chance = torch.Generator().manual_seed(1000 * seed + length)
    ids: list[int] = torch.randint(tiny_models.VOCAB, (length,), generator=chance).tolist()
    return ids


def assert_close(ours: torch.Tensor, truth: torch.Tensor, record: Record) -> None:
    """Every number within TOLERANCE of the range; NaN is not."""
    difference = float((ours - truth).abs().max() / (truth.max() - truth.min()))
    record("difference", difference)
    assert difference <= TOLERANCE


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_cold(pair: Pair, length: int, record_property: Record) -> None:
    prompt = random_prompt(length)
    ours = pair.prefill(prompt, 0, pair.pages(8), chunk=length)
    assert_close(ours, pair.truth(prompt), record_property)


@pytest.mark.parametrize("length", [64, 69])
def test_behind_a_cached_prefix_of_every_page_count(
    pair: Pair, length: int, record_property: Record
) -> None:
    """One sequence computes the prompt; others take its first k pages and compute the rest."""
    prompt = random_prompt(length)
    truth = pair.truth(prompt)
    first = pair.pages(5)
    pair.prefill(prompt, 0, first, chunk=length)
    before = pair.runner.pool.read[first].clone()
    for k in range((length - 1) // PAGE_SIZE + 1):
        start = k * PAGE_SIZE
        ours = pair.prefill(prompt, start, first[:k] + pair.pages(5 - k), chunk=length)
        assert_close(ours, truth[start:], record_property)
    after = pair.runner.pool.read[first]
    assert torch.equal(before.nan_to_num(-1.0), after.nan_to_num(-1.0)), "a shared page changed"


def test_the_last_token_alone_is_recomputed_in_a_copied_page(
    pair: Pair, record_property: Record
) -> None:
    """A page-aligned prompt that is cached as a whole: the last page is the sequence's own copy."""
    prompt = random_prompt(48)
    first, copy = pair.pages(3), pair.pages(1)
    pair.prefill(prompt, 0, first, chunk=48)
    pair.runner.pool.write[copy] = pair.runner.pool.read[first[2:]]
    ours = pair.prefill(prompt, 47, first[:2] + copy, chunk=1)
    assert_close(ours, pair.truth(prompt)[47:], record_property)


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_prefill_in_chunks(pair: Pair, chunk: int, record_property: Record) -> None:
    prompt = random_prompt(530)
    ours = pair.prefill(prompt, 0, pair.pages(34), chunk)
    assert_close(ours, pair.truth(prompt), record_property)


def test_a_mixed_batch(pair: Pair, record_property: Record) -> None:
    """A cold prompt, a middle chunk, a decode, and one behind another's pages, all in one pass."""
    prompts = [random_prompt(n, seed) for seed, n in enumerate((20, 50, 33, 40))]
    tables = [pair.pages(4) for _ in prompts]
    starts = [0, 23, 32, 32]
    for prompt, table, start in zip(prompts[1:3], tables[1:3], starts[1:3], strict=True):
        pair.prefill(prompt[:start], 0, table, chunk=start)
    pair.prefill(prompts[3], 0, tables[3], chunk=40)
    tables[3] = tables[3][:2] + pair.pages(1)
    ours = pair.logits(
        [
            SequenceChunk(prompt[start:], start, table, wants_logits=True)
            for prompt, start, table in zip(prompts, starts, tables, strict=True)
        ]
    )
    truth = [pair.truth(p)[start:] for p, start in zip(prompts, starts, strict=True)]
    assert_close(ours, torch.cat(truth), record_property)


def test_greedy_output_equals_generate(pair: Pair, record_property: Record) -> None:
    """64 tokens of four prompts, decoded together; other tokens only where the best two tie."""
    prompts = [random_prompt(n, seed=9) for n in (1, 16, 31, 60)]
    tables = [pair.pages(8) for _ in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    chunks = [SequenceChunk(p, 0, t, True) for p, t in zip(prompts, tables, strict=True)]
    for _ in range(64):
        best = pair.runner.run(chunks).argmax(dim=-1).tolist()
        for output, token in zip(outputs, best, strict=True):
            output.append(token)
        chunks = [
            SequenceChunk(o[-1:], len(p) + len(o) - 1, t, True)
            for p, o, t in zip(prompts, outputs, tables, strict=True)
        ]
    near_ties = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        answer = pair.oracle.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)
        expected = answer[0, len(prompt) :].tolist()
        assert len(expected) == 64
        if output != expected:
            at = next(i for i in range(64) if output[i] != expected[i])
            logits = pair.truth(prompt + expected[:at])
            best, second = logits[-1].topk(2).values
            assert best - second <= TOLERANCE * (logits.max() - logits.min()), f"token {at}"
            near_ties += 1
    record_property("near_ties", near_ties)
