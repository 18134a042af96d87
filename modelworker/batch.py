"""One forward pass over tokens of many sequences, flattened."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """T new tokens of B sequences, sequence after sequence.

    A sequence's new tokens see its whole context: the cached tokens before them and themselves,
    causally. New K and V go to `slots` before attention reads them.
    """

    token_ids: torch.Tensor  # int64[T]
    positions: torch.Tensor  # int64[T], from 0 in each sequence
    slots: torch.Tensor  # int64[T], page * page_size + offset
    query_starts: list[int]  # B + 1; new tokens of sequence b are query_starts[b]:[b + 1]
    context_lens: list[int]  # B; tokens of sequence b in the cache after this pass
    block_tables: list[torch.Tensor]  # B times int64[pages of context_lens[b] or more]
    logits_at: torch.Tensor  # int64[L], rows of the T whose logits are wanted
