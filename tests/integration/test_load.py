"""Many clients, few pages, two workers: every answer is right and every page comes back."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvd_shared import verbs
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.http_client import Client
from tests.integration.tiny_world import PRINTABLE, Oracle
from tests.worker import RunningWorker, WorkerNursery

PAGE_SIZE = 8
NUM_REQUESTS = 1000
NUM_CLIENTS = 16
SLOWEST_S = 30.0  # of any request, in a pool that is always full
Prompt = tuple[int, ...]


@contextmanager
def two_workers(
    nursery: WorkerNursery, folder: Path, tmp_path: Path, num_pages: int
) -> Iterator[tuple[RunningDaemon, list[RunningWorker]]]:
    with running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=num_pages) as daemon:
        workers = [nursery.start(daemon, name=name) for name in ("left", "right")]
        for worker in workers:
            _ = worker.url
        yield daemon, workers
        for worker in workers:
            assert not worker.ended() and "Traceback" not in worker.text(), worker.text()
            worker.close()


def check_all_given_back(daemon: RunningDaemon, num_pages: int) -> dict[str, Any]:
    """Asserts that no request is left, no session holds a page, and all pages are free or cached;
    returns the pool's status. Waits for the requests' end: a worker tells it with its next step, a
    moment after it has answered."""

    def idle() -> dict[str, Any] | None:
        (pool,) = daemon.ask(verbs.status())["pools"]
        return None if pool["running_requests"] or pool["waiting_requests"] else pool

    pool: dict[str, Any] = eventually(idle)
    counts = daemon.counts()
    assert counts["free"] + counts["cached"] == num_pages, counts
    assert all(session["held_pages"] == 0 for session in daemon.sessions().values())
    daemon.check()
    return pool


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: Prompt
    num_tokens: int


def make_asks(rng: random.Random) -> list[Ask]:
    """Ten questions about each of twenty documents."""

    def some(least: int, most: int) -> Prompt:
        return tuple(rng.choices(PRINTABLE, k=rng.randint(least, most)))

    documents = [some(60, 170) for _ in range(20)]
    return [Ask(d + some(6, 60), rng.randint(8, 24)) for d in documents for _ in range(10)]


def pages_of_all(asks: list[Ask], oracle: Oracle) -> int:
    """Pages that would keep every sequence, what is common counted once."""
    needed = set[Prompt]()
    for ask in asks:
        tokens = ask.prompt + oracle.expected(ask.prompt, ask.num_tokens).tokens
        needed |= {tokens[: i + PAGE_SIZE] for i in range(0, len(tokens), PAGE_SIZE)}
    return len(needed)


class Crowd:
    """Clients that take requests off one list. `done` counts how they ended."""

    def __init__(self, urls: list[str], asks: list[Ask], oracle: Oracle) -> None:
        self.done: Counter[str] = Counter()
        self.cached_tokens = 0
        self.slowest_s = 0.0
        self._urls = urls
        self._asks = asks
        self._oracle = oracle
        self._lock = threading.Lock()  # guards all that is counted, and the oracle
        self._failures: list[BaseException] = []

    def run(self, num_requests: int) -> None:
        """Raises what the first client raised."""
        numbers = iter(range(num_requests))
        threads = [
            threading.Thread(target=self._client, args=(numbers,)) for _ in range(NUM_CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _client(self, numbers: Iterator[int]) -> None:
        clients = [Client(url) for url in self._urls]
        try:
            while not self._failures:
                with self._lock:
                    number = next(numbers, None)
                if number is None:
                    break
                rng = random.Random(number)
                began = time.monotonic()
                ended = self._request(clients[number % len(clients)], rng, number)
                with self._lock:
                    self.done[ended] += 1
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        except BaseException as e:
            self._failures.append(e)
        finally:
            for client in clients:
                client.close()

    def _request(self, client: Client, rng: random.Random, number: int) -> str:
        ask = rng.choice(self._asks)
        if number % 3 == 0:
            pieces = client.stream(ask.prompt, 200)
            for _ in range(rng.randint(1, 20)):
                next(pieces)
            client.hang_up()
            return "cancelled"
        if number % 10 == 1:
            answer = client.complete(ask.prompt, ask.num_tokens, temperature=0.8, seed=number)
            assert answer.finish_reason == "length"
            return "sampled"
        if number % 2:
            answer = client.complete(ask.prompt, ask.num_tokens)
            text = answer.text
            with self._lock:
                self.cached_tokens += answer.cached_tokens
        else:
            text = "".join(client.stream(ask.prompt, ask.num_tokens))
        with self._lock:
            self._oracle.check(ask.prompt, ask.num_tokens, text)
        return "greedy"


def test_a_thousand_requests_in_a_tenth_of_the_pages(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """Sixteen clients ask two workers; a third of them hang up in the middle of their answers."""
    asks = make_asks(random.Random(7))
    num_pages = pages_of_all(asks, oracle) // 10
    near_ties = oracle.near_ties
    with two_workers(nursery, folder, tmp_path, num_pages) as (daemon, workers):
        crowd = Crowd([worker.url for worker in workers], asks, oracle)
        began = time.monotonic()
        crowd.run(NUM_REQUESTS)
        took_s = time.monotonic() - began
        assert crowd.done.total() == NUM_REQUESTS
        assert crowd.done["cancelled"] >= NUM_REQUESTS // 3
        assert crowd.slowest_s < SLOWEST_S
        pool = check_all_given_back(daemon, num_pages)
        preempted = sum(len(worker.logs("sequence.preempted")) for worker in workers)
    evicted = pool["left_pages"]["evicted"]
    assert crowd.cached_tokens and evicted and preempted
    print(
        f"{num_pages} pages, {NUM_REQUESTS / took_s:.0f} requests/s, slowest "
        f"{crowd.slowest_s:.1f} s, {preempted} preemptions, {evicted} evictions, "
        f"{pool['tokens_matched'] / pool['tokens_asked']:.0%} of the tokens cached, "
        f"{pool['duplicate_pages']} duplicates, near-ties {oracle.near_ties - near_ties}"
    )


def test_what_one_worker_computed_the_other_uses(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    prompt = tuple(random.Random(1).choices(PRINTABLE, k=100))
    with two_workers(nursery, folder, tmp_path, 64) as (daemon, workers):
        first, second = (Client(worker.url).complete(prompt, 20) for worker in workers)
        assert (first.cached_tokens, second.cached_tokens) == (0, 99 // PAGE_SIZE * PAGE_SIZE)
        oracle.check(prompt, 20, first.text)
        oracle.check(prompt, 20, second.text)
        check_all_given_back(daemon, 64)


@pytest.mark.parametrize("num_prompt", [30, 200])
def test_two_sequences_that_need_60_percent_each(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path, num_prompt: int
) -> None:
    """One in each worker: whether they grow into each other or collide at once, both finish."""
    num_pages, total = 50, 50 * PAGE_SIZE * 6 // 10
    rng = random.Random(2)
    prompts = [tuple(rng.choices(PRINTABLE, k=num_prompt)) for _ in range(2)]
    with two_workers(nursery, folder, tmp_path, num_pages) as (daemon, workers):
        answers = ["", ""]

        def ask(i: int) -> None:
            client = Client(workers[i].url)
            answers[i] = "".join(client.stream(prompts[i], total - num_prompt))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for prompt, answer in zip(prompts, answers, strict=True):
            oracle.check(prompt, total - num_prompt, answer)
        check_all_given_back(daemon, num_pages)
