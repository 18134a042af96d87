"""A model ready to run, and the one place that names the supported families.

To add a family whose body is Llama's (norms, rotary positions, grouped heads, gated MLP): write its
`read_…` function in model_config.py, saying what differs and refusing what it cannot mean, name it
in FAMILIES, and add a tiny model of it to the tests that compare with transformers. A family with
another body needs a forward pass beside llama.py, chosen in `Model.forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kvd_shared.model_folder import BadModelFolder, ModelFolder, Progress, read_model_folder
from modelworker import llama
from modelworker.batch import Batch
from modelworker.llama_weights import LlamaWeights, allocate, by_name
from modelworker.model_config import (
    ModelConfig,
    read_llama,
    read_mistral,
    read_qwen2,
    read_qwen3,
)
from modelworker.pool_view import PoolView
from modelworker.weights import load_into

FAMILIES: dict[str, Callable[[ModelFolder], ModelConfig]] = {
    "LlamaForCausalLM": read_llama,
    "MistralForCausalLM": read_mistral,
    "Qwen2ForCausalLM": read_qwen2,
    "Qwen3ForCausalLM": read_qwen3,
}


@dataclass(frozen=True, slots=True)
class Model:
    """Config and weights; K and V live in the pool that each call brings."""

    config: ModelConfig
    weights: LlamaWeights

    def forward(self, batch: Batch, pool: PoolView) -> torch.Tensor:
        """Logits float32[L, vocab]; writes the batch's K and V into the pool."""
        return llama.forward(self.config, self.weights, batch, pool)


def read_config(folder: ModelFolder) -> ModelConfig:
    """The folder's config as its family reads it. Raises BadModelFolder."""
    read = FAMILIES.get(folder.architecture)
    if read is None:
        raise BadModelFolder(
            f"{folder.config.where}: architectures = [{folder.architecture!r}] is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return read(folder)


def load_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Model:
    """Read a model folder and load its weights as `dtype`.

    `progress` gets bytes done and bytes in all after each tensor. Raises BadModelFolder.
    """
    config = read_config(read_model_folder(folder))
    weights = allocate(config, dtype, torch.device(device))
    twins = {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}
    load_into(by_name(weights, config), folder, twins=twins, progress=progress)
    return Model(config, weights)
