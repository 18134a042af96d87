"""The CPU path that serves: gather a sequence's pages of one layer, then fused attention.

Each sequence is computed by itself over its exact length, so a row does not depend on what else is
in the batch, and slots that nothing wrote are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvd_shared.layout import pages_needed


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """What attention of one sequence needs in every layer, made once a step."""

    first: int  # its new tokens are rows first:end of q
    end: int
    pages: torch.Tensor  # int64[pages of the context], in order
    context_len: int
    mask: torch.Tensor | None  # bool[end - first, context_len], True where seen; None: see below

    @property
    def is_causal(self) -> bool:
        """Without a mask, one new token sees all; several are the whole context."""
        return self.mask is None and self.end - self.first > 1


def write_kv(
    pages: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store each token's K and V at its slot, in place.

    `pages` [pages, layers, 2 (k, v), kv_heads, page_size, head_dim], the write mapping; `k`, `v`
    [T, kv_heads, head_dim], cast to the pages' dtype; `slots` int64[T], page * page_size + offset,
    no slot twice. Raises IndexError when a slot lies outside the pool.
    """
    page_size = pages.shape[4]
    page = slots.div(page_size, rounding_mode="floor")
    offset = slots.remainder(page_size)
    for kv, new in enumerate((k, v)):
        pages[:, layer, kv][page, :, offset] = new.to(pages.dtype)


def copy_pages(
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    """Make page targets[i] of `target_pages` equal to page sources[i] of `source_pages`.

    Both pages as in `write_kv`: the read and the write mapping of one memory. `sources`, `targets`
    int64[N]; no target twice, and none that is a source. Raises IndexError when a page lies outside
    the pool.
    """
    target_pages.index_copy_(0, targets, source_pages.index_select(0, sources))


def plan(
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[torch.Tensor],
    page_size: int,
) -> list[SequencePlan]:
    """Prepare attention for a batch; the same plan serves every layer of the step.

    New tokens of sequence b are rows query_starts[b]:query_starts[b + 1] of q and the last of its
    context_lens[b] tokens; `block_tables[b]` int64[pages of the context or more].
    """
    plans = []
    for b, context_len in enumerate(context_lens):
        first, end = query_starts[b], query_starts[b + 1]
        cached = context_len - (end - first)
        mask = None
        if end - first > 1 and cached:
            # row i sees the cached tokens and i + 1 new ones: aligned to the bottom right, where
            # is_causal would align to the top left
            mask = torch.ones(end - first, context_len, dtype=torch.bool).tril(cached)
        pages = block_tables[b][: pages_needed(context_len, page_size)]
        plans.append(SequencePlan(first, end, pages, context_len, mask))
    return plans


def paged_attention(
    q: torch.Tensor, pages: torch.Tensor, layer: int, plans: Sequence[SequencePlan]
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its pages; [T, heads, head_dim] like q.

    `q` [T, heads, head_dim], float32 or bfloat16; `pages` as in `write_kv`, the read mapping, cast
    to q's dtype as they are gathered. Query head h reads kv head h // (heads / kv_heads).
    """
    out = q.new_empty(q.shape)  # dense, though q may be a slice of something wider
    layer_pages = pages[:, layer].permute(
        1, 2, 0, 3, 4
    )  # [2, kv_heads, pages, page_size, head_dim]
    for sequence in plans:
        rows = q[sequence.first : sequence.end]
        out[sequence.first : sequence.end] = _attend(rows, layer_pages, sequence)
    return out


def _attend(q: torch.Tensor, layer_pages: torch.Tensor, sequence: SequencePlan) -> torch.Tensor:
    """One sequence: q [n, heads, head_dim] over `layer_pages` of all sequences; like q."""
    n, heads, head_dim = q.shape
    kv_heads = layer_pages.shape[1]
    gathered = layer_pages.index_select(2, sequence.pages).flatten(2, 3)
    k, v = gathered[:, :, : sequence.context_len].to(q.dtype)  # [kv_heads, context_len, head_dim]
    if n == 1:  # a kv head's group of query heads as if they were queries: K and V are read once
        packed = q.view(1, kv_heads, heads // kv_heads, head_dim)
        return F.scaled_dot_product_attention(packed, k[None], v[None]).view(q.shape)
    group = heads // kv_heads
    attended = F.scaled_dot_product_attention(
        q.view(n, kv_heads, group, head_dim).permute(1, 2, 0, 3),
        k[:, None].expand(-1, group, -1, -1),
        v[:, None].expand(-1, group, -1, -1),
        attn_mask=sequence.mask,
        is_causal=sequence.is_causal,
    )  # [kv_heads, group, n, head_dim]
    return attended.permute(2, 0, 1, 3).reshape(q.shape)
