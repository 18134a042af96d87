"""Rotary positions: the angle of a pair of features grows with the token's position."""

from __future__ import annotations

import math

import torch

from modelworker.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each feature pair, float32[head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Slow rotations are slowed by `factor`, fast ones stay; between the two bounds a blend.

    A rotation's speed is judged by how many turns it makes within the context that the model was
    first trained on: at most low_freq_factor is slow, at least high_freq_factor is fast.
    """
    turns = rope.original_context * frequencies / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    fast = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return fast * frequencies + (1 - fast) * frequencies / rope.factor


def rotations(
    positions: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of positions int64[T], each float32[T, 1, head_dim / 2]."""
    angles = positions[:, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] by `rotations`; feature i pairs with i + head_dim / 2.

    Computed in float32 and returned in x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
