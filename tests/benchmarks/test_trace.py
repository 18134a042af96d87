"""The trace benchmark: its reader, its replay, its bound, and policies on other shapes."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.trace.__main__ import TRACE
from tests.benchmarks.trace.clairvoyant import clairvoyant
from tests.benchmarks.trace.reader import TraceError, read_trace
from tests.benchmarks.trace.replay import replay
from tests.benchmarks.trace.request import Request, Trace
from tests.benchmarks.trace.shapes import SHAPES

GOOD = {"timestamp": 1000, "input_length": 900, "output_length": 5, "hash_ids": [7, 9]}


def trace_of(*prompts: tuple[int, ...]) -> Trace:
    return [Request(float(at), prompt) for at, prompt in enumerate(prompts)]


def written(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


# Pool of 4 blocks. LRU: nothing; 0 1; 0, for 2 had to go for 3 and 4; nothing, too long; then
# 0 3 4 are there. Three prompts of 3, one of 5, one of 3: 17 blocks.
TINY = trace_of((0, 1, 2), (0, 1, 2), (0, 3, 4), (5, 6, 7, 8, 9), (0, 3, 4))


def test_replay_of_a_trace_computed_by_hand() -> None:
    done = replay(TINY, "lru", 4, page_size=8)
    assert (done.found, done.asked, done.left_out) == (0 + 3 + 1 + 0 + 3, 17, 1)
    assert done.share == 7 / 17
    assert done.cpu_s > 0


def test_all_of_a_prompt_can_be_found() -> None:
    assert replay(trace_of((0, 1), (0, 1)), "lru", 2, page_size=8).found == 2


def test_lru_gives_the_end_of_the_oldest_prompt_away_first() -> None:
    """2 pages are short: the end of the oldest prompt, 2 and 1, go; its beginning is found."""
    trace = trace_of((0, 1, 2), (3, 4), (5, 6), (0, 1, 2))
    assert replay(trace, "lru", 5, page_size=8).found == 1


def test_clairvoyant_of_a_trace_computed_by_hand() -> None:
    """Keeps 0 and 1 of the first prompt, not the end that nobody asks for again."""
    trace = trace_of((0, 1, 2), (3, 4), (0, 1, 5))
    assert clairvoyant(trace, 4) == 2
    assert replay(trace, "lru", 4, page_size=8).found == 2
    assert clairvoyant(trace_of((0, 1), (2, 3), (0, 1), (2, 3)), 2) == 2
    assert clairvoyant(TINY, 4) == 7
    unfit = trace_of((0, 1), (2, 3), (0, 1, 4), (2, 3))
    assert clairvoyant(unfit, 2) == 2, "a prompt that is left out uses nothing"


@pytest.mark.parametrize("seed", range(30))
def test_clairvoyant_is_the_best_of_all_choices(seed: int) -> None:
    """Against every set of prefixes that could be kept after each request."""
    rng = random.Random(seed)
    tree = {0: (0,), 1: (1,), 2: (0, 2), 3: (0, 3), 4: (0, 2, 4), 5: (1, 5)}
    trace = trace_of(*(tree[rng.randrange(6)] for _ in range(8)))
    capacity = rng.choice([2, 3, 4])
    reached: dict[frozenset[int], int] = {frozenset(): 0}
    for request in trace:
        if len(request.blocks) > capacity:
            continue
        following: dict[frozenset[int], int] = {}
        for kept, found in reached.items():
            now = found + sum(block in kept for block in request.blocks)
            there = kept | set(request.blocks)
            for size in range(min(len(there), capacity) + 1):
                for choice in combinations(sorted(there), size):
                    chosen = frozenset(choice)
                    if all(set(tree[block]) <= chosen for block in chosen):
                        following[chosen] = max(following.get(chosen, 0), now)
        reached = following
    assert clairvoyant(trace, capacity) == max(reached.values())


def test_reader(tmp_path: Path) -> None:
    second = {**GOOD, "timestamp": 2500.5, "hash_ids": [7, 3]}
    trace = read_trace(written(tmp_path / "t", GOOD, second))
    assert trace == [Request(1.0, (0, 1)), Request(2.5005, (0, 2))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list"),
        ({**GOOD, "timestamp": "1"}, "line 2: field timestamp: '1'"),
        ({**GOOD, "timestamp": 999}, "line 2: field timestamp: 999 is before the line above"),
        ({**GOOD, "input_length": -1}, "line 2: field input_length: -1"),
        ({**GOOD, "output_length": None}, "line 2: field output_length: None"),
        ({**GOOD, "hash_ids": 5}, "line 2: field hash_ids"),
        ({**GOOD, "hash_ids": [True]}, "line 2: field hash_ids"),
        ({**GOOD, "hash_ids": []}, "line 2: field hash_ids: no blocks"),
        ({**GOOD, "hash_ids": [9]}, "line 2: field hash_ids: block 9 follows None here"),
        ({**GOOD, "hash_ids": [7, 7]}, "line 2: field hash_ids: block 7 follows 7 here"),
    ],
)
def test_reader_names_line_and_field(
    tmp_path: Path, line: dict[str, Any] | str, message: str
) -> None:
    with pytest.raises(TraceError) as raised:
        read_trace(written(tmp_path / "t", GOOD, line))
    assert message in str(raised.value)


def test_reader_without_a_file_or_requests(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file; name a trace with TRACE=file"):
        read_trace(tmp_path / "missing")
    with pytest.raises(TraceError, match="it has no requests"):
        read_trace(Path("/dev/null"))


@pytest.mark.parametrize("shape", SHAPES)
def test_density_finds_what_lru_finds_on_other_shapes(shape: str) -> None:
    """At most 1 % less, with several seeds and pools."""
    for seed, num_pages in ((1, 100), (2, 500)):
        trace = SHAPES[shape](seed, 1200)
        lru = replay(trace, "lru", num_pages, page_size=8)
        assert lru.found > 0.05 * lru.asked, "the shape tells nothing"
        assert replay(trace, "density", num_pages, page_size=8).found >= 0.99 * lru.found


def test_generated_blocks_follow_the_same_block_always() -> None:
    for shape in SHAPES.values():
        before: dict[int, int | None] = {}
        for request in shape(3, 300):
            for last, block in zip((None, *request.blocks), request.blocks, strict=False):
                assert before.setdefault(block, last) == last


@pytest.mark.skipif(not TRACE.exists(), reason="the conversation trace is not part of the project")
def test_golden_shares_of_the_conversation_trace() -> None:
    trace = read_trace(TRACE)
    assert replay(trace, "lru", 5859).share == pytest.approx(0.136, abs=0.0005)
    assert clairvoyant(trace, 5859) / 288_500 == pytest.approx(0.353, abs=0.0005)
    assert replay(trace, "density", 5859).share > 0.175
