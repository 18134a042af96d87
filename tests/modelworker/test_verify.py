from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from kvd_kernels import cpu
from kvd_shared.model_folder import BadModelFolder
from modelworker import verify
from modelworker.dense import DenseSequence
from modelworker.model import load_model
from modelworker.runner import ModelRunner, SequenceChunk
from tests.modelworker import tiny_models, toy_tokenizers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.make("llama-gqa"), tmp_path / "model")


@pytest.mark.parametrize("name", ["llama-rope3-biases", "llama-mha-tied", "qwen2", "qwen3"])
def test_the_dense_path_equals_transformers(name: str, tmp_path: Path) -> None:
    oracle = tiny_models.make(name)
    sequence = DenseSequence(
        load_model(tiny_models.save(oracle, tmp_path / "model"), torch.float32)
    )
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    with torch.no_grad():
        truth = oracle(torch.tensor([prompt])).logits[0]
    ours = [sequence.append(prompt[:6]), *(sequence.append([token]) for token in prompt[6:])]
    difference = (torch.stack(ours) - truth[5:]).abs().max()
    assert difference <= 1e-5 * (truth.max() - truth.min())


def test_a_good_model_agrees(folder: Path) -> None:
    out = io.StringIO()
    assert verify.run_verify(folder, out) == 0
    _, header, *rows, verdict = out.getvalue().splitlines()
    assert header.startswith("case ")
    names = [row[:28].strip() for row in rows]
    assert names == [
        *["cold, random"] * 3,
        "1 cached page, random",
        "2 cached pages, random",
        "3 cached pages, random",
        *(f"prefill in chunks of {chunk}" for chunk in (1, 7, 16, 512)),
    ]
    assert verdict.startswith("agree: 10 cases, largest difference ")
    assert "DISAGREE" not in out.getvalue()


def test_a_folder_with_a_tokenizer_is_tried_on_text_too(tmp_path: Path) -> None:
    model = tiny_models.make("llama-gqa", vocab_size=320)
    folder = tiny_models.save(model, tmp_path / "model")
    toy_tokenizers.byte_level().save(str(folder / "tokenizer.json"))
    results = list(verify.verify(folder, load_model(folder, torch.float32)))
    assert all(result.agrees for result in results)
    names = {result.case.name for result in results}
    assert {"cold, text", "1 cached page, text", "2 cached pages, text"} <= names


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    toy_tokenizers.byte_level().save(str(folder / "tokenizer.json"))
    with pytest.raises(
        BadModelFolder, match=r"gives token \d+, but config\.json has vocab_size = 131"
    ):
        verify.cases(folder, load_model(folder, torch.float32))


def test_one_wrong_page_of_one_layer_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 2 reads the second page of a sequence where its third should be."""
    attention = cpu.paged_attention

    def wrong(
        q: torch.Tensor, pages: torch.Tensor, layer: int, plans: list[cpu.SequencePlan]
    ) -> torch.Tensor:
        if layer == 2:
            for plan in plans:
                if len(plan.pages) == 3:
                    plan.pages[2] = plan.pages[1]
        return attention(q, pages, layer, plans)

    monkeypatch.setattr(cpu, "paged_attention", wrong)
    out = io.StringIO()
    assert verify.run_verify(folder, out) == 8
    assert out.getvalue().splitlines()[-1].startswith("DISAGREE: 10 cases")


def test_a_shared_page_with_foreign_content_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence that fills the shared pages gets its first token wrong: only hits disagree."""
    paged = ModelRunner.run

    def wrong(runner: ModelRunner, chunks: list[SequenceChunk]) -> torch.Tensor:
        first = chunks[0]
        if not first.wants_logits:
            token_ids = [(first.token_ids[0] + 1) % tiny_models.VOCAB, *first.token_ids[1:]]
            chunks = [SequenceChunk(token_ids, 0, first.block_table, False)]
        return paged(runner, chunks)

    monkeypatch.setattr(ModelRunner, "run", wrong)
    results = list(verify.verify(folder, load_model(folder, torch.float32)))
    assert {r.case.cached_pages > 0 for r in results if not r.agrees} == {True}
    assert {r.case.cached_pages > 0 for r in results if r.agrees} == {False}


def test_reading_what_nothing_wrote_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "write_kv", lambda *args: None)
    results = list(verify.verify(folder, load_model(folder, torch.float32)))
    assert not any(result.agrees for result in results)
    assert {result.difference for result in results} == {float("inf")}


def test_another_token_is_wrong_unless_the_best_two_nearly_tie(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = verify.Dense([1, 1, 1], torch.tensor([[0, 1, 0.99995], [0, 1, 0.5], [0, 1, 0.5]]))
    paged = torch.tensor([[0, 0.99995, 1], [0, 1, 0.50003], [0, 0.5, 1]])
    monkeypatch.setattr(verify, "_paged_logits", lambda *args: iter(torch.split(paged, 1)))
    model = load_model(folder, torch.float32)
    case = verify.Case(name="x", prompt=(1,))
    result = verify.compare(model, case, dense)
    assert (result.near_ties, result.wrong_tokens, result.difference) == (1, 1, 0.5)


@pytest.mark.parametrize(
    ("difference", "near_ties", "wrong_tokens", "agrees"),
    [(9e-5, 0, 0, True), (9e-5, 2, 0, True), (9e-5, 0, 1, False), (2e-4, 0, 0, False)],
)
def test_what_counts_as_agreement(
    difference: float, near_ties: int, wrong_tokens: int, agrees: bool
) -> None:
    case = verify.Case(name="x", prompt=(1,))
    good = verify.CaseResult(case, 0.0, near_ties=1, wrong_tokens=0)
    result = verify.CaseResult(case, difference, near_ties, wrong_tokens)
    report = verify.VerifyReport([good, result])
    assert (result.agrees, report.agrees) == (agrees, agrees)
    assert (report.largest_difference, report.near_ties) == (difference, near_ties + 1)


def test_nothing_compared_is_no_agreement() -> None:
    assert not verify.VerifyReport().agrees


def test_a_context_too_short_to_decode_in_is_refused(tmp_path: Path) -> None:
    model = tiny_models.make("llama-gqa", max_position_embeddings=64)
    with pytest.raises(BadModelFolder, match="a context of 64 tokens leaves no room for a prompt"):
        verify.run_verify(tiny_models.save(model, tmp_path / "model"), io.StringIO())
