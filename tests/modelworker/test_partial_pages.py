"""A page of which only the first tokens fit is copied, and the sequence goes on in the copy."""

from __future__ import annotations

import pytest

from modelworker.tokenizer import Tokenizer
from tests.modelworker.host import Host
from tests.modelworker.in_process import (
    Worker,
    check_idle,
    finished,
    greedy,
    prompt_of,
    run,
    tokens_of,
)

PAGE_SIZE = 8


@pytest.mark.parametrize("common", range(16, 25))
def test_what_fits_of_a_page_is_not_computed_again(tokenizer: Tokenizer, common: int) -> None:
    host = Host(32, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    known = prompt_of(40)
    worker.submit("known", known, 1)
    run(worker)
    before = worker.runner.num_computed
    prompt = [*known[:common], *[(t + 1) % 50 for t in known[common:30]]]
    events = worker.submit("a", prompt, 5)
    run(worker)
    assert tokens_of(events) == greedy(prompt, 5)
    in_pages, more = divmod(common, PAGE_SIZE)
    cached = common if more >= PAGE_SIZE // 2 else in_pages * PAGE_SIZE
    assert finished(events)[0].cached_tokens == cached
    assert worker.runner.num_computed - before == 30 - cached + 4
    assert worker.runner.num_copied == (cached > in_pages * PAGE_SIZE)
    # what was copied from is as it was
    again = worker.submit("again", known, 5)
    run(worker)
    assert tokens_of(again) == greedy(known, 5)
    check_idle(host)


def test_of_a_prompt_that_is_cached_to_its_end_the_last_token_is_computed(
    tokenizer: Tokenizer,
) -> None:
    host = Host(32, PAGE_SIZE)
    left, right = Worker(host, tokenizer, "left"), Worker(host, tokenizer, "right")
    prompt = prompt_of(32)
    left.submit("a", prompt, 1)
    run(left)
    events = right.submit("a", prompt, 9)
    run(right)
    assert right.runner.batches[0] == [1] and finished(events)[0].cached_tokens == 31
    assert tokens_of(events) == greedy(prompt, 9)
    check_idle(host)


def test_the_last_free_page_is_not_wanted_twice(tokenizer: Tokenizer) -> None:
    """With the page to copy held besides, the sequence would need more than the pool has."""
    host = Host(4, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    worker.submit("known", prompt_of(31), 1)
    run(worker)
    prompt = [*prompt_of(32)[:21], 1, 2, 3, 4, 5, 6, 7, 8, 9]
    events = worker.submit("a", prompt, 2)
    run(worker)
    assert tokens_of(events) == greedy(prompt, 2)
    check_idle(host)
