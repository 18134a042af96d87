"""A batch of sequences over a pool whose unwritten slots are NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvd_kernels import reference
from kvd_shared.layout import pages_needed

LAYERS, LAYER = 2, 1


@dataclass(frozen=True, slots=True)
class PagedCase:
    q: torch.Tensor  # [T, heads, head_dim]
    pages: torch.Tensor  # [pages, LAYERS, 2, kv_heads, page_size, head_dim]
    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[torch.Tensor]

    @property
    def page_size(self) -> int:
        return self.pages.shape[4]

    def truth(self) -> torch.Tensor:
        return reference.paged_attention(
            self.q, self.pages, LAYER, self.query_starts, self.context_lens, self.block_tables
        )

    def permuted(self, order: torch.Tensor) -> PagedCase:
        """The same content under other page ids: page p becomes order[p]."""
        pages = torch.empty_like(self.pages)
        pages[order] = self.pages
        tables = [order[table] for table in self.block_tables]
        return PagedCase(self.q, pages, self.query_starts, self.context_lens, tables)

    def alone(self, b: int) -> PagedCase:
        """Sequence b without its batch mates."""
        first, end = self.query_starts[b : b + 2]
        return PagedCase(
            self.q[first:end],
            self.pages,
            [0, end - first],
            [self.context_lens[b]],
            [self.block_tables[b]],
        )


def make_case(
    lengths: Sequence[tuple[int, int]],  # (new tokens, context length) of each sequence
    *,
    page_size: int = 16,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 20,
    dtype: torch.dtype = torch.float32,
) -> PagedCase:
    """Random K and V written at scattered pages; block tables are one page longer than needed."""
    chance = torch.Generator().manual_seed(0)
    wanted = [pages_needed(context, page_size) + 1 for _, context in lengths]
    num_pages = sum(wanted) + 3
    shape = (num_pages, LAYERS, 2, kv_heads, page_size, head_dim)
    pages = torch.full(shape, float("nan"), dtype=dtype)
    tables = list(torch.split(torch.randperm(num_pages, generator=chance)[: sum(wanted)], wanted))
    query_starts = [0]
    for (new, context), table in zip(lengths, tables, strict=True):
        query_starts.append(query_starts[-1] + new)
        positions = torch.arange(context)
        slots = table[positions // page_size] * page_size + positions % page_size
        k, v = torch.randn(2, context, kv_heads, head_dim, generator=chance)
        reference.write_kv(pages, LAYER, k, v, slots)
    q = torch.randn(query_starts[-1], heads, head_dim, generator=chance)
    return PagedCase(q, pages, query_starts, [context for _, context in lengths], tables)
