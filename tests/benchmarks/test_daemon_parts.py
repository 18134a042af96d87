"""The parts of bench-daemon on small pools: they measure what they say, and leave a sound cache."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvd.cache_check import check_cache
from kvd.results import Match
from tests.benchmarks.bare_echo import bare_echo
from tests.benchmarks.timed_daemon import TimedSelector
from tests.benchmarks.tree_suite import ROUNDS, Suite
from tests.benchmarks.workload import PAGE_SIZE, Garden, Tokens, filled


@pytest.mark.parametrize("head_pages", [0, 1])
def test_a_batch_times_every_operation_and_the_cache_is_sound(head_pages: int) -> None:
    garden = Garden(4000, head=Tokens(0).pages(head_pages))
    garden.plant(10, 8)
    suite = Suite(1024, lambda room: garden)
    suite.batch(seed=1)
    suite.batch(seed=2)
    samples = {name: timing.num_samples for name, timing in suite.timings().items()}
    assert samples["match, warm"] == samples["evict 1 page"] == 2 * ROUNDS
    assert all(samples.values()) and len(samples) == 15
    check_cache(garden.cache)
    assert not garden.session.num_held_pages, "an operation has left a hold behind"


class Noting(Suite):
    """Keeps what each kind of match found: pages, and tokens of the page that goes on."""

    found: dict[str, set[tuple[int, int]]]

    def _time(self, name: str, what: Callable[..., Any], *args: Any) -> Any:
        result = super()._time(name, what, *args)
        if isinstance(result, Match):
            places = self.found.setdefault(name, set())
            places.add((result.num_matched_pages, result.partial_tokens))
        return result


def test_every_match_ends_where_its_name_says() -> None:
    garden = Garden(4000)
    suite = Noting(1024, lambda room: garden)
    suite.found = {}
    suite.batch(seed=1)
    pages = 1024 // PAGE_SIZE
    assert suite.found == {
        "match, warm": {(pages, 0)},
        "match to a node's end": {(pages, 0)},
        "match, cold": {(0, 0)},
        "match inside an edge": {(pages + n, 0) for n in range(ROUNDS)},
        "match inside an edge, again": {(pages, 0)},
        "match and the page that goes on": {(pages, PAGE_SIZE // 2)},
        "match inside a first page": {(0, PAGE_SIZE // 2)},
    }


def test_a_filled_pool_is_full_and_makes_the_room_that_is_asked_for() -> None:
    garden = filled(1000, room=200)
    assert len(garden.cache.free_list) == 1000 - 12 * 64
    garden.make_room(500)
    assert len(garden.cache.free_list) == 500
    check_cache(garden.cache)


def test_the_echo_answers_with_frames_of_the_lengths_asked_for() -> None:
    with bare_echo() as echo:
        echo.like(0, [b"12345", b"678"], [b"1", b"22"])
        echo.like(1, [b"1"], [bytes(100_000)])
        sizes = []
        receive = echo._socket.recv_multipart
        for number in (0, 1, 0):
            echo._socket.send_multipart(echo._frames[number])
            sizes.append([len(frame) for frame in receive()])
        assert [len(frame) for frame in echo._frames[0]] == [5, 3]
        assert sizes == [[1, 2], [100_000], [1, 2]]


def test_a_long_turn_of_a_loop_is_noted_with_what_was_done_in_it() -> None:
    out, ops = io.StringIO(), list[str]()

    def burn() -> None:
        ops.append("burn")
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    async def turns() -> None:
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(burn)
        await asyncio.sleep(0.01)

    with asyncio.Runner(
        loop_factory=lambda: asyncio.SelectorEventLoop(TimedSelector(out, ops))
    ) as r:
        r.run(turns())
    lines = [line.split() for line in out.getvalue().splitlines()]
    burnt = [float(ms) for _, ms, what in lines if what == "burn"]
    assert len(burnt) == 1 and burnt[0] >= 20
