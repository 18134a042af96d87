"""From what each sequence wants computed to one flat batch, and its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvd_kernels.dispatch import kernels_for
from kvd_shared.errors import LayoutMismatch
from kvd_shared.lease import GEOMETRY
from kvd_shared.refs import page_ids
from modelworker.batch import Batch
from modelworker.model import Model
from modelworker.pool_view import PoolView

Ints = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """The next tokens of one sequence.

    Tokens 0:start are in the cache; these follow. `block_table` holds the page ids of the
    sequence in order, for all tokens of the chunk at least.
    """

    token_ids: Ints  # at least one
    start: int
    block_table: Ints
    wants_logits: bool  # of the chunk's last token


def build_batch(chunks: Sequence[SequenceChunk], page_size: int) -> Batch:
    """Lay chunks of different sequences end to end, in numpy: no Python work per token.

    Raises ValueError when a chunk is empty or its block table too short.
    """
    lengths = np.array([len(c.token_ids) for c in chunks], dtype=np.int64)
    starts = np.array([c.start for c in chunks], dtype=np.int64)
    table_lengths = np.array([len(c.block_table) for c in chunks], dtype=np.int64)
    contexts = starts + lengths
    # a table that is too short would run on into the next sequence's pages
    short = (lengths < 1) | (-(-contexts // page_size) > table_lengths)
    if short.any():
        b = int(short.argmax())
        raise ValueError(
            f"chunk {b}: {lengths[b]} tokens from {starts[b]} need at least one token and "
            f"{-(-contexts[b] // page_size)} pages of {page_size}, it has {table_lengths[b]} pages"
        )
    query_starts = np.concatenate(([0], lengths.cumsum()))
    positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], lengths)
    tables = np.concatenate([np.asarray(c.block_table, dtype=np.int64) for c in chunks])
    table_starts = table_lengths.cumsum() - table_lengths
    pages = tables[np.repeat(table_starts, lengths) + positions // page_size]
    wanted = np.array([c.wants_logits for c in chunks], dtype=np.bool_)
    token_ids = np.concatenate([np.asarray(c.token_ids, dtype=np.int64) for c in chunks])
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(pages * page_size + positions % page_size),
        query_starts=query_starts.tolist(),
        context_lens=contexts.tolist(),
        block_tables=list(torch.split(torch.from_numpy(tables), table_lengths.tolist())),
        logits_at=torch.from_numpy(query_starts[1:][wanted] - 1),
    )


class ModelRunner:
    """A model and the pool that it computes over."""

    def __init__(self, model: Model, pool: PoolView) -> None:
        """Raises LayoutMismatch when the pool's pages are not of the model's geometry."""
        for name in GEOMETRY:
            has, needs = getattr(pool.layout, name), getattr(model.config, name)
            if has != needs:
                raise LayoutMismatch(f"{name}: the pool has {has}, the model needs {needs}")
        self.model = model
        self.pool = pool

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages: page references (from, to)."""
        if pairs:
            pages = page_ids(np.array(pairs, dtype=np.int64)).astype(np.int64)
            sources, targets = torch.from_numpy(pages).unbind(dim=1)
            kernels = kernels_for(self.pool.write.device)
            kernels.copy_pages(self.pool.read, self.pool.write, sources, targets)

    def run(self, chunks: Sequence[SequenceChunk]) -> torch.Tensor:
        """Compute all chunks in one pass: K and V into their pages, logits of those that want them.

        Returns float32[those, vocab] in the order of `chunks`.
        """
        return self.model.forward(build_batch(chunks, self.pool.layout.page_size), self.pool)
