"""What pages cost the attention of this CPU, since the baseline pays for them without need.

Every mode computes over pages. A system that reserves contiguous memory would attend to K and V
where they lie, in place of gathering pages first: this says how much shorter its steps would be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from kvd_kernels import cpu
from modelworker.cli import SHIPPED_MODEL
from modelworker.model import load_model
from modelworker.pool_view import PoolView
from modelworker.runner import ModelRunner, SequenceChunk

REPEATS = 30


def contiguous_saves(num_sequences: int, context: int, page_size: int) -> float:
    """The share of a step that decodes so many sequences which contiguous K and V would save."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    model = load_model(SHIPPED_MODEL, torch.float32)
    config, pages_each = model.config, -(-context // page_size)
    pool = PoolView.private(config.layout(page_size), num_sequences * pages_each)
    pool.write.normal_()
    scattered = np.random.default_rng(0).permutation(pool.num_pages).reshape(num_sequences, -1)
    chunks = [SequenceChunk([2], context - 1, table, wants_logits=True) for table in scattered]
    runner = ModelRunner(model, pool)

    rows = num_sequences
    q = torch.randn(rows, config.num_heads, config.head_dim)
    plans = cpu.plan(
        range(rows + 1), [context] * rows, [torch.from_numpy(t) for t in scattered], page_size
    )
    whole = (config.num_layers, rows, 2, config.num_kv_heads, context, config.head_dim)
    kv = torch.randn(whole)

    def paged() -> None:
        for layer in range(config.num_layers):
            cpu.paged_attention(q, pool.read, layer, plans)

    def contiguous() -> None:
        for layer in range(config.num_layers):
            for row in range(rows):
                k, v = kv[layer, row]
                F.scaled_dot_product_attention(
                    q[row].view(1, config.num_kv_heads, -1, config.head_dim), k[None], v[None]
                )

    with torch.inference_mode():
        step_s, paged_s, contiguous_s = _medians_s(lambda: runner.run(chunks), paged, contiguous)
    return (paged_s - contiguous_s) / step_s


def _medians_s(*what: Callable[[], object]) -> list[float]:
    """One after the other, again and again, so that a noisy neighbour meets all of them."""
    times: list[list[float]] = [[] for _ in what]
    for _ in range(REPEATS):
        for each, taken in zip(what, times, strict=True):
            began = time.perf_counter()
            each()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]
