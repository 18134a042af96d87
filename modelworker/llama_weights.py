"""The weights of a Llama-shaped model. Matrices that read the same input lie in one tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelworker.model_config import ModelConfig
from modelworker.rope import inverse_frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer; H hidden, F intermediate, D head_dim, A query heads, K kv heads."""

    input_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [(A + 2K) * D, H]: queries, keys, values
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    o: torch.Tensor  # [H, A * D]
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2F, H]: gate, up
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [H, F]
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaWeights:
    embedding: torch.Tensor  # [vocab, H]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [H]
    lm_head: torch.Tensor  # [vocab, H]; the very embedding when tied
    rope_frequencies: torch.Tensor  # float32[D / 2], from the config


def allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LlamaWeights:
    """Weights of a model's shape; what model folders store is not yet filled."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, wide, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query_rows = config.num_heads * dim
    qkv_rows = query_rows + 2 * config.num_kv_heads * dim
    layers = tuple(
        LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(qkv_rows, hidden),
            qkv_bias=empty(qkv_rows) if config.qkv_bias else None,
            q_norm=empty(dim) if config.qk_norm else None,
            k_norm=empty(dim) if config.qk_norm else None,
            o=empty(hidden, query_rows),
            o_bias=empty(hidden) if config.o_bias else None,
            mlp_norm=empty(hidden),
            gate_up=empty(2 * wide, hidden),
            gate_up_bias=empty(2 * wide) if config.mlp_bias else None,
            down=empty(hidden, wide),
            down_bias=empty(hidden) if config.mlp_bias else None,
        )
        for _ in range(config.num_layers)
    )
    embedding = empty(config.vocab_size, hidden)
    lm_head = embedding if config.tied else empty(config.vocab_size, hidden)
    return LlamaWeights(
        embedding=embedding,
        layers=layers,
        norm=empty(hidden),
        lm_head=lm_head,
        rope_frequencies=inverse_frequencies(config.rope, dim).to(device),
    )


def by_name(weights: LlamaWeights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights under the names that model folders give them: views, not copies."""
    named: dict[str, torch.Tensor | None] = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.norm,
        "lm_head.weight": None if config.tied else weights.lm_head,
    }
    kv_rows = config.num_kv_heads * config.head_dim
    qkv_rows = [config.num_heads * config.head_dim, kv_rows, kv_rows]
    for number, layer in enumerate(weights.layers):
        prefix = f"model.layers.{number}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        named[f"{prefix}.input_layernorm.weight"] = layer.input_norm
        named[f"{prefix}.post_attention_layernorm.weight"] = layer.mlp_norm
        named[f"{attention}.q_norm.weight"] = layer.q_norm
        named[f"{attention}.k_norm.weight"] = layer.k_norm
        named[f"{attention}.o_proj.weight"] = layer.o
        named[f"{attention}.o_proj.bias"] = layer.o_bias
        named[f"{mlp}.down_proj.weight"] = layer.down
        named[f"{mlp}.down_proj.bias"] = layer.down_bias
        for kind, qkv, gate_up in (
            ("weight", layer.qkv, layer.gate_up),
            ("bias", layer.qkv_bias, layer.gate_up_bias),
        ):
            if qkv is not None:
                for which, part in zip("qkv", torch.split(qkv, qkv_rows), strict=True):
                    named[f"{attention}.{which}_proj.{kind}"] = part
            if gate_up is not None:
                for side, part in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                    named[f"{mlp}.{side}_proj.{kind}"] = part
    return {name: tensor for name, tensor in named.items() if tensor is not None}
