"""The list of harmless swaps fits the sources."""

from __future__ import annotations

import pytest

from tests.kvd.metadata.swaps.harmless import REPOSITORY, Swap, load


@pytest.mark.parametrize("swap", load(), ids=lambda swap: swap.file)
def test_each_names_a_place_that_is_there_and_says_why(swap: Swap) -> None:
    assert (REPOSITORY / swap.file).read_text().count(swap.old) == 1
    assert sorted(swap.old.split()) != swap.new.split() and swap.old != swap.new
    assert len(swap.reason) > 40
