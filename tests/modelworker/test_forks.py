"""n continuations of one prompt: it is computed once, and only tails are copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvd.options import CacheOptions
from kvd.options import Limits as SessionLimits
from kvd_shared.errors import OverLimit
from kvd_shared.rpc import Notice
from modelworker.requests import Failed, SamplingParams
from modelworker.scheduler import Limits
from modelworker.tokenizer import Tokenizer
from tests.modelworker import toy_tokenizers
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


def held_pages(host: Host) -> int:
    """Pages that somebody holds, each counted once."""
    return host.cache.num_pages - host.cache.num_available


@pytest.mark.parametrize("num_prompt", [20, 21, 24, 7, 8, 1])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_is_computed_once_and_its_pages_are_there_once(
    tokenizer: Tokenizer, num_prompt: int, use_cache: bool
) -> None:
    host, n = Host(64, PAGE_SIZE), 8
    worker = Worker(host, tokenizer, limits=Limits(lease_ahead_s=0))
    prompt = prompt_of(num_prompt)
    events = worker.submit("a", prompt, 3, n=n, use_cache=use_cache)
    worker.step()  # the prompt
    assert worker.runner.batches == [[num_prompt]]
    assert [tokens_of(events, i) for i in range(n)] == [greedy(prompt, 1)] * n
    worker.step()  # everyone's second token
    full, tail = divmod(num_prompt, PAGE_SIZE)
    assert held_pages(host) == full + n
    assert worker.runner.num_copied == (n - 1 if tail else 0)
    run(worker)
    assert worker.runner.num_computed == num_prompt + n * 2
    assert [tokens_of(events, i) for i in range(n)] == [greedy(prompt, 3)] * n
    assert {end.cached_tokens for end in finished(events)} == {0}
    check_idle(host)


def test_a_first_token_that_is_the_last_needs_no_fork(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    events = worker.submit("a", prompt_of(20), 1, n=5)
    run(worker)
    assert [tokens_of(events, i) for i in range(5)] == [greedy(prompt_of(20), 1)] * 5
    assert not worker.client.calls["fork"] and worker.runner.batches == [[20]]
    check_idle(host)


def test_the_leader_may_yield_in_the_step_that_forks_it(tokenizer: Tokenizer) -> None:
    """Its last page is held until the others have copied it."""
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    events = worker.submit("a", prompt_of(20), 30, n=3)
    worker.step()
    worker.client.noticed.append(Notice("yield", 1))
    run(worker)
    assert worker.client.calls["fork"] == 2
    assert [tokens_of(events, i) for i in range(3)] == [greedy(prompt_of(20), 30)] * 3
    check_idle(host)


def test_the_leader_may_end_with_its_first_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It draws the end of the text; the others draw something else, and go on in its pages."""
    host, prompt = Host(64, PAGE_SIZE), prompt_of(20)
    params = SamplingParams(max_tokens=12, temperature=0.3, seed=7)
    worker = Worker(host, tokenizer)
    first = worker.submit("first", prompt, 12, params=params, use_cache=False)
    run(worker)
    eos = {"eos_token_id": tokens_of(first)[0]}
    ending = Tokenizer.from_folder(toy_tokenizers.folder(tmp_path, generation_config=eos))
    worker = Worker(host, ending)
    together = worker.submit("n", prompt, 12, n=3, params=params)
    run(worker)
    assert worker.client.calls["fork"] == 2 and tokens_of(together) == [eos["eos_token_id"]]
    for i in (1, 2):
        alone = SamplingParams(max_tokens=12, temperature=0.3, seed=7 + i)
        events = worker.submit(f"alone {i}", prompt, 12, params=alone)
        run(worker)
        assert tokens_of(together, i) == tokens_of(events)
    check_idle(host)


def test_a_leader_that_yields_before_its_prompt_is_done_forks_later(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer, limits=Limits(max_batch_tokens=8))
    events = worker.submit("a", prompt_of(20), 5, n=3)
    worker.step()
    worker.client.noticed.append(Notice("yield", 1))
    run(worker)
    assert worker.client.calls["fork"] == 2 and worker.runner.num_computed == 20 + 3 * 4
    assert [tokens_of(events, i) for i in range(3)] == [greedy(prompt_of(20), 5)] * 3
    check_idle(host)


@pytest.mark.parametrize("num_prompt", [20, 24])
def test_those_that_find_no_page_queue_by_themselves(tokenizer: Tokenizer, num_prompt: int) -> None:
    """The pool has pages for the leader and one more; another session has all the rest."""
    host = Host(6, PAGE_SIZE)
    worker, other = Worker(host, tokenizer), host.client("other")
    rest = host.cache.allocate(other.session, 6 - 3 - (num_prompt > 20) - 1, None, 0.0)
    prompt = prompt_of(num_prompt)
    events = worker.submit("a", prompt, 4, n=4)
    for _ in range(4):
        worker.step()
        host.check()
    assert len(finished(events)) < 4
    host.cache.free(other.session, rest, 0.0)
    run(worker)
    assert [tokens_of(events, i) for i in range(4)] == [greedy(prompt, 4)] * 4
    check_idle(host)


def test_no_more_run_than_may(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer, limits=Limits(max_sequences=3))
    told = [worker.submit(name, prompt_of(20, i), 9, n=4) for i, name in enumerate("ab")]
    for _ in range(60):
        worker.step()
        assert int(str(worker.engine.health()["running"])) <= 3
        assert all(len(batch) <= 3 for batch in worker.runner.batches)
    for i, events in enumerate(told):
        assert [tokens_of(events, j) for j in range(4)] == [greedy(prompt_of(20, i), 9)] * 4
    check_idle(host)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_cancelled_request_leaves_nothing(tokenizer: Tokenizer, steps: int) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    worker.submit("a", prompt_of(20), 9, n=4)
    for _ in range(steps):
        worker.step()
    worker.engine.cancel("a")
    run(worker)
    check_idle(host)


def test_two_workers_with_the_same_n(tokenizer: Tokenizer) -> None:
    """Both compute the prompt, so what one forks turns out to be double in the very same step."""
    host = Host(64, PAGE_SIZE)
    workers = [Worker(host, tokenizer, name, Limits(waits=False)) for name in ("left", "right")]
    prompt = prompt_of(20)
    told = [worker.submit("a", prompt, 30, n=3) for worker in workers]
    for _ in range(12):
        for worker in workers:
            worker.step()
            host.check()
    assert workers[1].client.calls["fork"] == 2 and host.cache.counters.duplicate_pages >= 2
    run(*workers)
    for events in told:
        assert [tokens_of(events, i) for i in range(3)] == [greedy(prompt, 30)] * 3
    check_idle(host)


def test_seeds_give_the_same_texts_as_one_by_one(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    prompt = prompt_of(20)

    def ask(name: str, seed: int, n: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=12, temperature=0.3, seed=seed)
        events = worker.submit(name, prompt, 12, n=n, params=params)
        run(worker)
        return [tokens_of(events, i) for i in range(n)]

    together = ask("n", 7, 4)
    assert together == [ask(f"one {i}", 7 + i, 1)[0] for i in range(4)]
    assert len({tuple(tokens) for tokens in together}) == 4


def test_a_request_over_the_sessions_limit_fails_and_the_worker_lives(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE, CacheOptions(limits=SessionLimits(max_pages_a_session=6)))
    worker = Worker(host, tokenizer)
    (refusal,) = _run_until_told(worker, "long", 60)
    assert isinstance(refusal, Failed) and isinstance(refusal.error, OverLimit)
    # three that fit one by one, and not together: they wait for each other
    told = [worker.submit(str(i), prompt_of(20, i), 20) for i in range(3)]
    run(worker)
    for i, events in enumerate(told):
        assert tokens_of(events) == greedy(prompt_of(20, i), 20)
    forks = worker.submit("n", prompt_of(20), 20, n=4)
    run(worker)
    assert [tokens_of(forks, i) for i in range(4)] == [greedy(prompt_of(20), 20)] * 4
    check_idle(host)


def test_a_prompt_over_the_pools_limit_fails_and_the_others_go_on(tokenizer: Tokenizer) -> None:
    host = Host(64, PAGE_SIZE, CacheOptions(limits=SessionLimits(max_prompt_tokens=30)))
    worker = Worker(host, tokenizer)
    fine = worker.submit("fine", prompt_of(20), 3)
    long = worker.submit("long", prompt_of(40), 3, n=2)
    run(worker)
    assert tokens_of(fine) == greedy(prompt_of(20), 3)
    assert [type(e) for e in long] == [Failed]
    check_idle(host)


def _run_until_told(worker: Worker, name: str, num_prompt: int) -> list[object]:
    events = worker.submit(name, prompt_of(num_prompt), 3)
    run(worker)
    return list(events)
