from __future__ import annotations

import pytest
import torch

from kvd_kernels import cpu, reference
from tests.kernels.paged_case import make_case

SOURCES, TARGETS = torch.tensor([4, 0, 4]), torch.tensor([1, 5, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_equal_the_reference_bit_for_bit_and_touch_nothing_else(dtype: torch.dtype) -> None:
    pages = make_case([(1, 60), (1, 45)], dtype=dtype).pages
    expected, copied = pages.clone(), pages.clone()
    reference.copy_pages(expected, expected, SOURCES, TARGETS)
    cpu.copy_pages(copied, copied, SOURCES, TARGETS)
    assert torch.equal(copied.view(torch.uint8), expected.view(torch.uint8))  # NaN included
    untouched = [p for p in range(len(pages)) if p not in TARGETS]
    assert torch.equal(copied[untouched].view(torch.uint8), pages[untouched].view(torch.uint8))
    assert torch.equal(copied[1].view(torch.uint8), pages[4].view(torch.uint8))


def test_the_source_mapping_is_only_read() -> None:
    pages = make_case([(1, 60), (1, 45)]).pages
    source, target = pages.clone(), torch.zeros_like(pages)
    cpu.copy_pages(source, target, SOURCES, TARGETS)
    assert torch.equal(source.nan_to_num(), pages.nan_to_num())
    assert torch.equal(target[5].nan_to_num(), pages[0].nan_to_num())
    assert not target[4].any()


def test_no_pages_are_no_work() -> None:
    pages = make_case([(1, 20)]).pages
    none = torch.empty(0, dtype=torch.int64)
    cpu.copy_pages(pages, pages, none, none)


@pytest.mark.parametrize(("source", "target"), [(1_000, 0), (0, 1_000)])
def test_a_page_outside_the_pool_is_refused(source: int, target: int) -> None:
    pages = make_case([(1, 20)]).pages
    with pytest.raises(IndexError):
        cpu.copy_pages(pages, pages, torch.tensor([source]), torch.tensor([target]))
