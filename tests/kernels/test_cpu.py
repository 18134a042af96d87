from __future__ import annotations

import pytest
import torch

from kvd_kernels import cpu, reference
from kvd_kernels.dispatch import NoKernels, kernels_for
from tests.kernels.paged_case import LAYER, LAYERS, PagedCase, make_case

ATOL = 2e-6  # outputs are near 1 and computed in float32 whatever the pool holds


def attend(case: PagedCase) -> torch.Tensor:
    plan = cpu.plan(case.query_starts, case.context_lens, case.block_tables, case.page_size)
    return cpu.paged_attention(case.q, case.pages, LAYER, plan)


def edges(page_size: int) -> list[int]:
    return [1, page_size - 1, page_size, page_size + 1, 2 * page_size, 3 * page_size + 1]


@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_decode_equals_the_reference_at_every_page_edge(page_size: int) -> None:
    case = make_case([(1, context) for context in edges(page_size)], page_size=page_size)
    torch.testing.assert_close(attend(case), case.truth(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_whole_prompts_equal_the_reference(page_size: int) -> None:
    case = make_case([(context, context) for context in edges(page_size)], page_size=page_size)
    torch.testing.assert_close(attend(case), case.truth(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("new", [2, 5, 8])
def test_new_tokens_behind_cached_ones_see_them_and_each_other(page_size: int, new: int) -> None:
    lengths = [(new, new + cached) for cached in edges(page_size)]
    case = make_case(lengths, page_size=page_size)
    torch.testing.assert_close(attend(case), case.truth(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_pool_is_read_into_float32(dtype: torch.dtype) -> None:
    case = make_case([(1, 33), (7, 40), (16, 16)], dtype=dtype)
    out = attend(case)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, case.truth(), atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 8), (4, 4, 16), (7, 1, 20), (15, 5, 2), (6, 2, 80)]
)
def test_odd_head_counts(heads: int, kv_heads: int, head_dim: int) -> None:
    case = make_case([(1, 17), (9, 30), (5, 5)], heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    torch.testing.assert_close(attend(case), case.truth(), atol=ATOL, rtol=0)


def test_where_pages_lie_changes_no_bit() -> None:
    case = make_case([(1, 50), (12, 45), (33, 33)])
    order = torch.randperm(len(case.pages), generator=torch.Generator().manual_seed(1))
    assert torch.equal(attend(case), attend(case.permuted(order)))


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    case = make_case([(1, 50), (12, 45), (1, 3), (33, 33)])
    together = attend(case)
    for b, (first, end) in enumerate(zip(case.query_starts, case.query_starts[1:], strict=False)):
        assert torch.equal(together[first:end], attend(case.alone(b)))


def test_a_sequence_never_sees_another_ones_pages() -> None:
    """Overwrite everything that sequence 0 does not own with NaN: it must not notice."""
    case = make_case([(3, 20), (1, 40)])
    before = attend(case.alone(0))
    others = torch.ones(len(case.pages), dtype=torch.bool)
    others[case.block_tables[0]] = False
    case.pages[others] = float("nan")
    assert torch.equal(attend(case.alone(0)), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_kv_stores_at_the_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    shape = (5, LAYERS, 2, 3, 8, 4)
    slots = torch.tensor([39, 0, 7, 8, 21])
    k, v = torch.randn(2, len(slots), 3, 4, generator=torch.Generator().manual_seed(0))
    served, truth = torch.full(shape, 7.0, dtype=dtype), torch.full(shape, 7.0, dtype=dtype)
    cpu.write_kv(served, LAYER, k, v, slots)
    reference.write_kv(truth, LAYER, k, v, slots)
    assert torch.equal(served, truth)
    assert int((served != 7.0).sum()) == 2 * k.numel()


def test_write_kv_outside_the_pool_is_an_error() -> None:
    pages = torch.zeros(2, LAYERS, 2, 1, 8, 4)
    with pytest.raises(IndexError):
        cpu.write_kv(pages, 0, torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.tensor([16]))


def test_a_device_without_kernels_is_refused_by_name() -> None:
    assert kernels_for(torch.device("cpu")) is cpu
    with pytest.raises(NoKernels, match="kernels for cuda are not built yet: keep the pool"):
        kernels_for(torch.device("cuda"))
