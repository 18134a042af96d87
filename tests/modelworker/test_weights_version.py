"""KV that nobody wants any more: it is computed with to the end, and not published."""

from __future__ import annotations

from modelworker.requests import Failed
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


def test_stale_weights_are_used_and_not_published(tokenizer: Tokenizer) -> None:
    host = Host(32, PAGE_SIZE)
    old = Worker(host, tokenizer, "old", weights_version=1)
    before = old.submit("before", prompt_of(20), 30, n=2)
    for _ in range(6):
        old.step()
    assert host.cache.tree.num_pages
    host.cache.raise_weights_version(None, 2)
    host.cache.flush(list(host.cache.tree.roots.values()), "stale_version")
    published = old.client.calls["publish"]
    after = old.submit("after", prompt_of(20), 20, n=2)
    run(old)
    # each of the running ones was told so, and the leader of the new ones for both
    assert old.client.calls["publish"] == published + 3
    for events, num_tokens in ((before, 30), (after, 20)):
        assert not any(isinstance(event, Failed) for event in events)
        assert [tokens_of(events, i) for i in range(2)] == [greedy(prompt_of(20), num_tokens)] * 2
        assert {end.cached_tokens for end in finished(events)} == {0}
    while host.cache.sweep(0.0):
        pass
    assert host.cache.tree.num_pages == 0
    new = Worker(host, tokenizer, "new", weights_version=2)
    for cached in (0, 16):
        events = new.submit(f"new {cached}", prompt_of(20), 20)
        run(new)
        assert finished(events)[0].cached_tokens == cached
    check_idle(host)


def test_a_flush_does_not_disturb_who_computes_behind_it(tokenizer: Tokenizer) -> None:
    host = Host(32, PAGE_SIZE)
    worker = Worker(host, tokenizer)
    events = worker.submit("a", prompt_of(20), 30)
    for _ in range(3):
        worker.step()
    host.cache.flush(list(host.cache.tree.roots.values()))
    run(worker)
    assert tokens_of(events) == greedy(prompt_of(20), 30)
    refused = worker.client.calls["publish"]
    while host.cache.sweep(0.0):
        pass
    assert host.cache.tree.num_pages == 0
    # what came in later is published again, and the refused one asked but once more
    again = worker.submit("b", prompt_of(20), 5)
    run(worker)
    assert finished(again)[0].cached_tokens == 0 and host.cache.tree.num_pages == 3
    assert refused == 2
    check_idle(host)
