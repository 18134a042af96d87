"""What the kernels must compute, token by token in float32: slow, and easy to check by eye."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def write_kv(
    pages: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store each token's K and V at its slot, in place.

    `pages` [pages, layers, 2 (k, v), kv_heads, page_size, head_dim]; `k`, `v` [T, kv_heads,
    head_dim]; `slots` int64[T], page * page_size + offset, no slot twice.
    """
    page_size = pages.shape[4]
    for token, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, page_size)
        pages[page, layer, 0, :, offset] = k[token].to(pages.dtype)
        pages[page, layer, 1, :, offset] = v[token].to(pages.dtype)


def copy_pages(
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    """Make page targets[i] of `target_pages` equal to page sources[i] of `source_pages`.

    Both pages as in `write_kv`: the read and the write mapping of one memory. `sources`, `targets`
    int64[N]; no target twice, and none that is a source.
    """
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        target_pages[target] = source_pages[source]


def read_kv(
    pages: torch.Tensor, layer: int, block_table: torch.Tensor, context_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sequence, float32[context_len, kv_heads, head_dim], token by token."""
    page_size = pages.shape[4]
    tokens = [
        pages[block_table[position // page_size], layer, :, :, position % page_size]
        for position in range(context_len)
    ]
    k, v = torch.stack(tokens, dim=1).float()
    return k, v


def paged_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    layer: int,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its pages; float32[T, heads, head_dim].

    `q` [T, heads, head_dim]; `pages` as in `write_kv`. The new tokens of sequence b are rows
    query_starts[b]:query_starts[b + 1] and the last of its context_lens[b] tokens. Query head h
    reads kv head h // (heads / kv_heads).
    """
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    group = q.shape[1] // pages.shape[3]
    for b, context_len in enumerate(context_lens):
        k, v = read_kv(pages, layer, block_tables[b], context_len)
        first, end = query_starts[b], query_starts[b + 1]
        for row in range(first, end):
            seen = context_len - (end - row) + 1
            for head in range(q.shape[1]):
                keys, values = k[:seen, head // group], v[:seen, head // group]
                scores = keys @ q[row, head].float() / q.shape[2] ** 0.5
                out[row, head] = torch.softmax(scores, dim=0) @ values
    return out
