"""One forward pass of a Llama-shaped model over paged KV."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvd_kernels.dispatch import kernels_for
from modelworker.batch import Batch
from modelworker.llama_weights import LayerWeights, LlamaWeights
from modelworker.model_config import ModelConfig
from modelworker.pool_view import PoolView
from modelworker.rope import rotate, rotations


@torch.inference_mode()
def forward(
    config: ModelConfig, weights: LlamaWeights, batch: Batch, pool: PoolView
) -> torch.Tensor:
    """Logits float32[L, vocab] of the rows `batch.logits_at`.

    Writes K and V of the batch's tokens into the pool at `batch.slots`; every slot of their
    contexts before them must have been written.
    """
    kernels = kernels_for(pool.read.device)
    plan = kernels.plan(
        batch.query_starts, batch.context_lens, batch.block_tables, pool.layout.page_size
    )
    turns = rotations(batch.positions, weights.rope_frequencies)
    x = F.embedding(batch.token_ids, weights.embedding)
    for number, layer in enumerate(weights.layers):
        h = F.rms_norm(x, x.shape[-1:], layer.input_norm, config.rms_eps)
        q, k, v = _project(config, layer, h, turns)
        kernels.write_kv(pool.write, number, k, v, batch.slots)
        attended = kernels.paged_attention(q, pool.read, number, plan).flatten(1)
        x = x + F.linear(attended, layer.o, layer.o_bias)
        h = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, config.rms_eps)
        x = x + _mlp(layer, h)
    h = F.rms_norm(x[batch.logits_at], x.shape[-1:], weights.norm, config.rms_eps)
    return F.linear(h, weights.lm_head).float()


def _project(
    config: ModelConfig,
    layer: LayerWeights,
    h: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h [T, H] to q [T, heads, D], k and v [T, kv_heads, D], normed and rotated."""
    heads = F.linear(h, layer.qkv, layer.qkv_bias).view(len(h), -1, config.head_dim)
    qk_heads = [config.num_heads, config.num_kv_heads]
    num_qk = sum(qk_heads)
    qk, v = heads[:, :num_qk], heads[:, num_qk:]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = torch.split(qk, qk_heads, dim=1)
        q = F.rms_norm(q, q.shape[-1:], layer.q_norm, config.rms_eps)
        k = F.rms_norm(k, k.shape[-1:], layer.k_norm, config.rms_eps)
        qk = torch.cat((q, k), dim=1)
    q, k = torch.split(rotate(qk, *turns), qk_heads, dim=1)
    return q, k, v


def _mlp(layer: LayerWeights, h: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(h, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
