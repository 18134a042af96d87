"""Model folders that are damaged or not what their config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvd_shared.model_folder import BadModelFolder
from modelworker.llama_weights import by_name
from modelworker.model import load_model
from tests.modelworker import tiny_models

Tensors = dict[str, torch.Tensor]
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "llama-gqa", *, shards: bool = False, **changes: Any) -> Path:
        return tiny_models.save(tiny_models.make(name, **changes), tmp_path / "m", shards=shards)

    return make


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the single weight file with its tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(BadModelFolder) as refused:
        load_model(folder, torch.float32)
    return refused.value.message


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", list(tiny_models.FAMILIES))
def test_every_tensor_arrives_under_its_name(
    make_folder: Callable[..., Path], name: str, shards: bool
) -> None:
    folder = make_folder(name, shards=shards)
    model = load_model(folder, torch.float32)
    stored: Tensors = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    named = by_name(model.weights, model.config)
    assert set(named) == set(stored)
    assert all(torch.equal(named[name], stored[name]) for name in stored)


def test_weights_are_cast_as_they_are_loaded(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    edit(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    down = load_model(folder, torch.float32).weights.layers[1].down
    assert down.dtype == torch.float32
    assert torch.equal(down, load_file(folder / "model.safetensors")[DOWN].float())
    assert load_model(folder, torch.bfloat16).weights.norm.dtype == torch.bfloat16


def test_progress_ends_at_the_whole(make_folder: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    model = load_model(
        make_folder(shards=True), torch.float32, progress=lambda *now: seen.append(now)
    )
    total = sum(t.nbytes for t in by_name(model.weights, model.config).values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_missing_shard(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(shards=True)
    victim = min(folder.glob("model-*.safetensors"))
    victim.unlink()
    assert refusal(folder) == (
        f"{victim}: no such file, but model.safetensors.index.json names it: "
        "is the download complete?"
    )


def test_missing_tensor(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    edit(folder, lambda tensors: [tensors.pop(NORM), tensors.pop(DOWN)])
    assert refusal(folder) == (
        f"{folder}: the weight files lack 2 of 30 tensors, the first is {DOWN}"
    )


def test_wrong_shape(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    edit(folder, lambda tensors: tensors.update({DOWN: torch.zeros(60, 78)}))
    assert refusal(folder) == (
        f"{folder}/model.safetensors: {DOWN} has shape [60, 78], config.json describes [60, 77]"
    )


def test_unexpected_tensor(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    name = "model.layers.3.mlp.down_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(60, 77)}))
    assert f"unexpected tensor {name}: config.json describes a model without it" in refusal(folder)


def test_stored_rotation_frequencies_are_what_the_config_says_anyway(
    make_folder: Callable[..., Path],
) -> None:
    folder = make_folder()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(5)}))
    load_model(folder, torch.float32)


def test_quantised_storage_is_refused(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    edit(folder, lambda tensors: tensors.update({DOWN: torch.zeros(60, 77, dtype=torch.int8)}))
    assert refusal(folder).endswith(f"{DOWN} is stored as I8: supported are F32, BF16, F16")


def test_the_same_tensor_in_two_shards(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(shards=True)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    tensors = load_file(first)
    save_file({**load_file(last), **tensors}, last)
    assert f"{last}: {min(tensors)} is in an earlier file already" in refusal(folder)


def test_an_lm_head_beside_a_tied_embedding_must_equal_it(
    make_folder: Callable[..., Path],
) -> None:
    folder = make_folder("llama-mha-tied")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    edit(folder, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    load_model(folder, torch.float32)
    edit(folder, lambda tensors: tensors.update({head: tensors[embedding] + 1}))
    assert f"{head} differs from {embedding}, but config.json ties them" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_weights(make_folder: Callable[..., Path], kept: int) -> None:
    folder = make_folder()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(folder)
    assert message.startswith(f"{file}: not a whole safetensors file (")
    assert message.endswith("): is the download complete?")


def test_bad_json_in_the_index(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(shards=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    assert refusal(folder).startswith(f"{index}: cannot be read as JSON: ")


def test_an_unsupported_architecture(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Mamba"]}))
    assert "architectures = ['Mamba'] is not supported; supported are Llama" in refusal(folder)
