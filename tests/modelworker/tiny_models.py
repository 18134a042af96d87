"""Random-weight models of the supported families, made and saved by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

CONTEXT = 1024  # tokens
VOCAB = 131
ODD: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,  # far from uniform: a wrong token must show
    "rms_norm_eps": 0.5,  # a size at which forgetting it shows
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so that all three kinds of frequency occur
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-rope3-biases": (
        "Llama",
        {
            "head_dim": 14,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "llama-linear-one-kv-head": (
        "Llama",
        {"num_key_value_heads": 1, "rope_parameters": LINEAR_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def make(name: str, **changes: Any) -> Any:
    """The transformers model of that name; the same weights every time."""
    family, own = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**ODD, **own, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which hide faults
                torch.nn.init.normal_(parameter, mean=0.8, std=0.3)
    return model


def save(model: Any, folder: Path, *, shards: bool = False) -> Path:
    """Write a model folder; with `shards` as several files and an index."""
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == shards
    return folder
