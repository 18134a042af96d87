from __future__ import annotations

import numpy as np
import pytest
import torch

from kvd_shared.errors import LayoutMismatch
from kvd_shared.layout import PoolLayout
from modelworker.llama_weights import allocate
from modelworker.model import Model
from modelworker.model_config import ModelConfig, RopeConfig
from modelworker.pool_view import PoolView
from modelworker.runner import ModelRunner, SequenceChunk, build_batch


def test_chunks_are_laid_end_to_end() -> None:
    """A prompt's first two tokens, a middle chunk over a page border, and a decode."""
    batch = build_batch(
        [
            SequenceChunk([5, 6], 0, [9], wants_logits=False),
            SequenceChunk(np.array([1, 2, 3], dtype=np.int32), 7, [4, 2, 8], wants_logits=True),
            SequenceChunk([7], 16, np.array([1, 0, 3], dtype=np.int32), wants_logits=True),
        ],
        page_size=8,
    )
    assert batch.token_ids.tolist() == [5, 6, 1, 2, 3, 7]
    assert batch.positions.tolist() == [0, 1, 7, 8, 9, 16]
    assert batch.slots.tolist() == [72, 73, 39, 16, 17, 24]
    assert batch.query_starts == [0, 2, 5, 6]
    assert batch.context_lens == [2, 10, 17]
    assert [table.tolist() for table in batch.block_tables] == [[9], [4, 2, 8], [1, 0, 3]]
    assert batch.logits_at.tolist() == [4, 5]
    for tensor in (batch.token_ids, batch.positions, batch.slots, batch.logits_at):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (
            SequenceChunk([1], 8, [3], True),
            "chunk 1: 1 tokens from 8 need .* 2 pages of 8, it has 1",
        ),
        (SequenceChunk([], 8, [3], True), "chunk 1: 0 tokens from 8 need at least one token"),
    ],
)
def test_a_chunk_that_would_run_into_its_neighbour_is_refused(
    chunk: SequenceChunk, message: str
) -> None:
    good = SequenceChunk([1], 0, [0], True)
    with pytest.raises(ValueError, match=message):
        build_batch([good, chunk, good], page_size=8)


CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=16,
    intermediate_size=8,
    vocab_size=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    context_length=64,
    rms_eps=1e-6,
    rope=RopeConfig(theta=1e4, type="default"),
    tied=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
)


def model() -> Model:
    weights = allocate(CONFIG, torch.float32, torch.device("cpu"))
    for layer in weights.layers:
        for tensor in (layer.input_norm, layer.qkv, layer.o, layer.mlp_norm):
            tensor.fill_(0.1)
        layer.gate_up.fill_(0.1)
        layer.down.fill_(0.1)
    weights.embedding.fill_(0.1)
    weights.norm.fill_(0.1)
    return Model(CONFIG, weights)


def pool(**changes: int) -> PoolView:
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, **changes}
    return PoolView.private(PoolLayout(page_size=8, dtype="float32", **sizes), 4)


def test_only_the_chunks_that_want_logits_get_them() -> None:
    runner = ModelRunner(model(), pool())
    asked = [SequenceChunk([1, 2], 0, [3], False), SequenceChunk([4], 0, [1], True)]
    logits = runner.run(asked)
    assert (logits.shape, logits.dtype) == ((1, 10), torch.float32)
    assert runner.run(asked[:1]).shape == (0, 10)


def test_a_pass_writes_its_own_slots_and_no_others() -> None:
    view = pool()
    ModelRunner(model(), view).run([SequenceChunk([1, 2, 3], 0, [2], True)])
    written = ~view.read.isnan()
    assert written[2, :, :, :, :3].all()
    assert int(written.sum()) == written[2, :, :, :, :3].numel()


def test_pages_are_copied_whole_by_their_references() -> None:
    view = pool()
    runner = ModelRunner(model(), view)
    runner.run([SequenceChunk([1, 2, 3], 0, [2], True)])
    later_generation = (7 << 32) | 1
    runner.copy_pages([(2, later_generation), (2, 3)])
    for copy in (1, 3):
        torch.testing.assert_close(view.read[copy], view.read[2], equal_nan=True)
    assert view.read[0].isnan().all()
    runner.copy_pages([])


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim"])
def test_a_pool_of_another_geometry_is_refused_with_both_numbers(name: str) -> None:
    with pytest.raises(LayoutMismatch, match=rf"{name}: the pool has 6, the model needs \d"):
        ModelRunner(model(), pool(**{name: 6}))
