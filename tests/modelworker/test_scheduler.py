"""Which sequence computes what, over a real cache without sockets."""

from __future__ import annotations

import random

import pytest

from kvd_shared.errors import Draining
from kvd_shared.rpc import Notice
from modelworker.requests import RequestTooLong
from modelworker.scheduler import Limits
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


def test_a_request_from_prompt_to_pages_given_back(tokenizer: Tokenizer) -> None:
    host = Host(16, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    prompt = prompt_of(20)
    events = worker.submit("a", prompt, 5)
    run(worker)
    assert tokens_of(events) == greedy(prompt, 5)
    (end,) = finished(events)
    assert (end.reason, end.num_generated, end.cached_tokens) == ("length", 5, 0)
    # of 25 tokens the last one's K and V are never needed: 24 fill 3 pages
    assert host.cache.tree.num_pages == 3
    check_idle(host)


def test_full_pages_are_shared_while_the_sequence_goes_on(tokenizer: Tokenizer) -> None:
    host = Host(32, PAGE_SIZE)
    left, right = Worker(host, tokenizer, "left"), Worker(host, tokenizer, "right")
    prompt = prompt_of(17)
    left.submit("a", prompt, 40)
    left.step()  # computes the prompt
    left.step()  # publishes it
    events = right.submit("b", [*prompt, 7], 3)
    run(left, right)
    assert finished(events)[0].cached_tokens == 16
    assert tokens_of(events) == greedy([*prompt, 7], 3)
    check_idle(host)


def test_pages_computed_twice_are_swapped_and_given_back(tokenizer: Tokenizer) -> None:
    """Both workers compute one prompt in the same step, as they do where they do not wait for each
    other: the slower one's pages come back while it still decodes."""
    host = Host(32, PAGE_SIZE)
    limits = Limits(waits=False, lease_ahead_s=0)
    left, right = (Worker(host, tokenizer, name, limits) for name in ("left", "right"))
    prompt = prompt_of(33)
    events = [worker.submit("a", prompt, 30) for worker in (left, right)]
    for _ in range(4):
        left.step()
        right.step()
        host.check()
    # 4 full pages of the prompt are there once, and each worker fills a page of its own
    assert host.cache.counters.duplicate_pages == 4
    assert host.cache.num_pages - len(host.cache.free_list) == 4 + 2
    run(left, right)
    assert [tokens_of(e) for e in events] == [greedy(prompt, 30)] * 2
    check_idle(host)


def test_long_prompts_are_computed_in_chunks_beside_decoding(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer, limits=Limits(max_batch_tokens=16))
    worker.submit("a", prompt_of(5, 1), 12)
    worker.step()
    worker.submit("b", prompt_of(40, 2), 2)
    run(worker)
    # the decoding one has its token first, the prompt gets what is left of 16
    assert worker.runner.batches[:5] == [[5], [1, 15], [1, 15], [1, 10], [1, 1]]
    assert max(map(sum, worker.runner.batches)) == 16
    check_idle(host)


def test_decoding_goes_before_what_an_older_sequence_has_to_compute_again(
    tokenizer: Tokenizer,
) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer, limits=Limits(max_batch_tokens=8))
    old = worker.submit("old", prompt_of(6, 1), 30, use_cache=False)
    young = worker.submit("young", prompt_of(4, 2), 30)
    while len(tokens_of(old)) < 10:
        worker.step()
    worker.client.noticed.append(Notice("yield", 1))
    del worker.runner.batches[:]
    for _ in range(4):
        worker.step()
    assert worker.runner.batches == [[1, 7], [1, 7], [1, 2], [1, 1]]
    run(worker)
    assert tokens_of(old) == greedy(prompt_of(6, 1), 30)
    assert tokens_of(young) == greedy(prompt_of(4, 2), 30)
    check_idle(host)


def test_the_longest_cached_prefix_goes_first_until_the_others_lose_patience(
    tokenizer: Tokenizer,
) -> None:
    host = Host(64, PAGE_SIZE)
    limits = Limits(max_sequences=1, patience_s=1000.0)
    worker = Worker(host, tokenizer, limits=limits)
    known = prompt_of(65, 1)
    worker.submit("known", known, 1)
    run(worker)
    worker.submit("busy", prompt_of(5, 2), 8)
    worker.step()
    order: list[str] = []
    for name, prompt in [("cold", prompt_of(20, 3)), ("half", known[:33]), ("whole", known)]:
        worker.submit(name, prompt, 1)
    for _ in range(40):
        worker.step()
        order += [n for n, e in worker.events.items() if finished(e) and n not in order]
    assert order == ["known", "busy", "whole", "half", "cold"]
    check_idle(host)


def test_after_their_patience_the_oldest_goes_first(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer, limits=Limits(max_sequences=1, patience_s=0.0))
    known = prompt_of(65, 1)
    worker.submit("known", known, 1)
    run(worker)
    worker.submit("busy", prompt_of(5, 2), 8)
    worker.step()
    worker.submit("cold", prompt_of(20, 3), 1)
    worker.submit("whole", known, 1)
    order: list[str] = []
    for _ in range(40):
        worker.step()
        order += [n for n, e in worker.events.items() if finished(e) and n not in order]
    assert order == ["known", "busy", "cold", "whole"]


def test_what_a_cancelled_request_has_computed_is_kept(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer, limits=Limits(max_batch_tokens=16))
    gone = worker.submit("gone", prompt_of(60), 6, n=3)
    stays = worker.submit("stays", prompt_of(60), 6)
    worker.step()  # asks what the cache has for both
    worker.step()
    worker.engine.cancel("gone")
    run(worker)
    assert not finished(gone)
    assert tokens_of(stays) == greedy(prompt_of(60), 6)
    # what the cancelled one had computed was kept: the other found it
    assert finished(stays)[0].cached_tokens == 16
    check_idle(host)


def test_without_the_cache_nothing_is_matched_or_published(tokenizer: Tokenizer) -> None:
    host = Host(32, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    prompt = prompt_of(12)
    for name in ("a", "b"):
        events = worker.submit(name, prompt, 4, n=2, use_cache=False)
        run(worker)
        assert [tokens_of(events, i) for i in range(2)] == [greedy(prompt, 4)] * 2
        assert {end.cached_tokens for end in finished(events)} == {0}
    assert host.cache.tree.num_pages == 0
    assert not worker.client.calls["publish"] and not worker.client.calls["acquire"]
    check_idle(host)


def test_salts_part_tenants(tokenizer: Tokenizer) -> None:
    host = Host(32, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    for salt, cached in ((b"one", 0), (b"two", 0), (b"one", 8)):
        events = worker.submit(f"{salt!r}{cached}", prompt_of(10), 2, salt=salt)
        run(worker)
        assert finished(events)[0].cached_tokens == cached


@pytest.mark.parametrize("num_prompt", [8, 92])
def test_two_that_need_60_percent_of_the_pool_each(tokenizer: Tokenizer, num_prompt: int) -> None:
    """The younger one yields, waits, and resumes from what is left of its pages."""
    host, limits = Host(20, PAGE_SIZE), Limits(lease_ahead_s=0)
    left, right = (Worker(host, tokenizer, name, limits) for name in ("left", "right"))
    prompts = [prompt_of(num_prompt, seed) for seed in range(2)]
    events = [
        worker.submit("a", prompt, 96 - num_prompt)
        for worker, prompt in zip((left, right), prompts, strict=True)
    ]
    run(left, right)
    for prompt, told in zip(prompts, events, strict=True):
        assert tokens_of(told) == greedy(prompt, 96 - num_prompt)
    # the first to begin is never asked to yield
    assert left.client.calls["yielded"] == 0
    assert right.client.calls["yielded"] == (1 if num_prompt == 8 else 0)
    check_idle(host)


def test_what_can_never_fit_is_refused_with_both_numbers(tokenizer: Tokenizer) -> None:
    host = Host(4, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    with pytest.raises(RequestTooLong, match=r"\b33\b.*\b32\b"):
        worker.submit("a", prompt_of(23), 10)
    events = worker.submit("b", prompt_of(23), 9)  # the whole pool
    run(worker)
    assert tokens_of(events) == greedy(prompt_of(23), 9)
    check_idle(host)


def test_a_worker_that_is_stopped_finishes_and_publishes_what_it_has(tokenizer: Tokenizer) -> None:
    host = Host(16, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    events = worker.submit("a", prompt_of(20), 5)
    worker.engine.stop()
    with pytest.raises(Draining):
        worker.submit("late", prompt_of(20), 5)
    worker.engine.run()
    assert tokens_of(events) == greedy(prompt_of(20), 5)
    assert not worker.client.alive
    assert host.cache.tree.num_pages == 3  # the last page filled in the last step
    check_idle(host)


def test_a_worker_that_dies_leaves_its_pages_to_the_other(tokenizer: Tokenizer) -> None:
    host = Host(20, PAGE_SIZE)
    left, right = Worker(host, tokenizer, "left"), Worker(host, tokenizer, "right")
    left.submit("a", prompt_of(9, 1), 120)
    for _ in range(70):
        left.step()
    events = right.submit("b", prompt_of(9, 2), 120)
    for _ in range(70):
        right.step()
    assert not finished(events)
    left.client.close()
    run(right)
    assert tokens_of(events) == greedy(prompt_of(9, 2), 120)
    check_idle(host)


@pytest.mark.parametrize("seed", range(12))
def test_any_load_in_a_tiny_pool(tokenizer: Tokenizer, seed: int) -> None:
    """Three workers, every kind of request, cancellations and a death; each pool is too small for
    what runs. All answers are right, and in the end nothing is held."""
    rng = random.Random(seed)
    num_pages = rng.choice([6, 10, 20])
    host = Host(num_pages, PAGE_SIZE)
    limits = Limits(
        max_batch_tokens=rng.choice([4, 16, 64]),
        max_sequences=rng.choice([2, 5, 20]),
        patience_s=rng.choice([0.0, 1000.0]),
    )
    workers = [Worker(host, tokenizer, f"worker {i}", limits) for i in range(3)]
    documents = [prompt_of(rng.randint(1, 20), seed) for seed in range(3)]
    asked: dict[tuple[Worker, str], tuple[list[int], int, int]] = {}
    cancelled: set[tuple[Worker, str]] = set()
    for turn in range(400):
        worker = rng.choice(workers)
        if rng.random() < 0.3:
            prompt = [*rng.choice(documents), *prompt_of(rng.randint(1, 12), rng.randrange(20))]
            new = rng.randint(1, num_pages * PAGE_SIZE - len(prompt)) // rng.choice([1, 4, 4])
            n = rng.choice([1, 1, 1, 3])
            worker.submit(str(turn), prompt, max(1, new), n=n, use_cache=rng.random() < 0.9)
            asked[worker, str(turn)] = prompt, max(1, new), n
        if rng.random() < 0.1 and asked:
            chosen = rng.choice(list(asked))
            cancelled.add(chosen)
            chosen[0].engine.cancel(chosen[1])
        if turn == 300:
            dead = workers.pop()
            dead.client.close()
            asked = {key: value for key, value in asked.items() if key[0] is not dead}
        worker = rng.choice(workers)
        worker.step()
        check_worker(worker)
        host.check()
    run(*workers, steps=20_000)
    for (worker, request_id), (prompt, new, n) in asked.items():
        events = worker.events[request_id]
        expected = greedy(prompt, new)
        for index in range(n):
            tokens = tokens_of(events, index)
            assert tokens == expected[: len(tokens)]
        if (worker, request_id) not in cancelled:
            assert {end.index for end in finished(events)} == set(range(n))
            assert {end.num_generated for end in finished(events)} == {new}
    check_idle(host)


def check_worker(worker: Worker) -> None:
    """The scheduler's own invariants, between two steps."""
    scheduler = worker.engine._work.scheduler
    assert not set(scheduler.waiting) & set(scheduler.running)
    for sequence in scheduler.waiting:
        assert not sequence.refs and not sequence.num_computed and not sequence.finished
    held = [ref for sequence in scheduler.running for ref in sequence.refs]
    tree = worker.client.session.nodes
    session = worker.client.session
    own = {*session.leased, *session.writing, *session.sealed}
    for sequence in scheduler.running:
        assert sequence.num_published <= sequence.num_full_pages(PAGE_SIZE) <= len(sequence.refs)
        assert sequence.num_computed <= sequence.num_tokens
    in_tree = sum(node.num_pages for node in tree)
    assert len(set(held)) <= in_tree + len(own)
