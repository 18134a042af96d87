"""The same model without pages: contiguous K and V, softmax written out, matrix by matrix.

It shares the weights, the config and the rotation frequencies with the paged path and nothing else,
so that a page read wrongly shows as a difference.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from modelworker.llama_weights import by_name
from modelworker.model import Model


class DenseSequence:
    """One sequence and its contiguous K and V, in float32."""

    def __init__(self, model: Model) -> None:
        self._config = model.config
        self._frequencies = model.weights.rope_frequencies
        self._tensors = by_name(model.weights, model.config)
        self._keys = [torch.empty(0) for _ in range(model.config.num_layers)]
        self._values = list(self._keys)  # both [tokens, kv_heads, head_dim] once there are any
        self._num_tokens = 0

    @torch.inference_mode()
    def append(self, token_ids: list[int]) -> torch.Tensor:
        """Continue the sequence; logits float32[vocab] after its last token."""
        config = self._config
        positions = torch.arange(self._num_tokens, self._num_tokens + len(token_ids))
        x = self._tensors["model.embed_tokens.weight"][token_ids].float()
        for layer in range(config.num_layers):
            part = _under(self._tensors, f"model.layers.{layer}.")
            h = self._norm(x, part["input_layernorm.weight"])
            x = x + self._attention(layer, _under(part, "self_attn."), h, positions)
            h = self._norm(x, part["post_attention_layernorm.weight"])
            mlp = _under(part, "mlp.")
            gate = _linear(mlp, "gate_proj", h)
            x = x + _linear(mlp, "down_proj", gate * gate.sigmoid() * _linear(mlp, "up_proj", h))
        self._num_tokens += len(token_ids)
        last = self._norm(x[-1], self._tensors["model.norm.weight"])
        head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        return self._tensors[head].float() @ last

    def _attention(
        self, layer: int, part: Mapping[str, torch.Tensor], h: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """h [new, hidden] to the attention's output of the same shape; keeps the new K and V."""
        dim, group = self._config.head_dim, self._config.num_heads // self._config.num_kv_heads
        q, k, v = (_linear(part, f"{which}_proj", h).view(len(h), -1, dim) for which in "qkv")
        if self._config.qk_norm:
            q, k = self._norm(q, part["q_norm.weight"]), self._norm(k, part["k_norm.weight"])
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        if self._num_tokens:
            k, v = torch.cat((self._keys[layer], k)), torch.cat((self._values[layer], v))
        self._keys[layer], self._values[layer] = k, v
        every = torch.arange(len(k))
        unseen = every[None, :] > positions[:, None]  # [new, tokens]
        heads = []
        for head in range(self._config.num_heads):
            scores = q[:, head] @ k[:, head // group].T / dim**0.5
            weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1)
            heads.append(weights @ v[:, head // group])
        return _linear(part, "o_proj", torch.cat(heads, dim=-1))

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As complex numbers: features i and i + head_dim / 2 are one's real and imaginary part."""
        angles = positions[:, None].float() * self._frequencies
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        real, imaginary = x.chunk(2, dim=-1)
        turned = torch.complex(real, imaginary) * turns
        return torch.cat((turned.real, turned.imag), dim=-1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self._config.rms_eps).sqrt() * weight


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _linear(part: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ part[f"{name}.weight"].float().T
    bias = part.get(f"{name}.bias")
    return y if bias is None else y + bias
