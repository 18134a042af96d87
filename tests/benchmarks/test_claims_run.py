"""A few requests through the benchmark's worker, over a real daemon."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelworker.cli import SHIPPED_MODEL
from tests.benchmarks.claims.answers import unexplained
from tests.benchmarks.claims.conversations import CONTEXT, with_cue
from tests.benchmarks.claims.modes import NUM_SLOTS, PAGE_SIZE, PAGED, SHARED, WHOLE
from tests.benchmarks.claims.plan import Ask
from tests.benchmarks.claims.worker import new_engine, run
from tests.daemon import running_daemon

DOCUMENT = np.random.default_rng(1).integers(2, 512, 64)
NUM_TOKENS = 6
NUM_REQUESTS = 12


def ask(seed: int) -> Ask:
    return Ask(with_cue(DOCUMENT, NUM_TOKENS, np.random.default_rng(seed)), NUM_TOKENS)


def test_modes_differ_in_memory_and_not_in_answers(tmp_path: Path) -> None:
    """Eight whole contexts fit, so a third of the requests waits; in pages all have room."""
    asks = [ask(seed) for seed in range(NUM_REQUESTS)]
    num_pages = NUM_SLOTS // PAGE_SIZE
    with running_daemon(tmp_path, model=SHIPPED_MODEL, num_pages=num_pages) as daemon:
        engine = new_engine(daemon.socket_dir, "worker")
        # one after another: the prefix is there when the others come
        first = run(engine, SHARED.plan(asks[:1], "shared"))
        whole, paged, shared = (
            run(engine, mode.plan(asks, name))
            for mode, name in ((WHOLE, "whole"), (PAGED, "paged"), (SHARED, "shared"))
        )
        engine.stop()
        engine.run()
        daemon.check()
    assert whole.memory.taken == pytest.approx(8 * CONTEXT)
    assert whole.memory.running <= 8 + 1e-9
    assert whole.memory.waste > 0.9 and paged.memory.waste < 0.2
    assert unexplained(asks, whole.answers, paged.answers) == 0
    assert unexplained(asks, whole.answers, shared.answers) == 0
    assert all(len(answer) == NUM_TOKENS for answer in whole.answers)
    needed = sum(len(a.prompt) + NUM_TOKENS - 1 for a in asks)
    assert whole.computed_tokens == paged.computed_tokens == needed
    assert whole.cached_tokens == paged.cached_tokens == first.cached_tokens == 0
    assert shared.cached_tokens >= NUM_REQUESTS * len(DOCUMENT)
    assert shared.computed_tokens == needed - shared.cached_tokens
    assert paged.num_steps < whole.num_steps


def test_an_answer_that_differs_for_no_reason_is_counted() -> None:
    """The model is sure of its quote: no rounding explains another token."""
    asks = [ask(1), ask(2)]
    right = [list(quoted(each)) for each in asks]
    wrong = [right[0], [*right[1][:3], (right[1][3] + 1) % 512, *right[1][4:]]]
    assert unexplained(asks, right, right) == 0
    assert unexplained(asks, right, wrong) == 1


def quoted(of: Ask) -> tuple[int, ...]:
    """What follows the cue in the document."""
    document = DOCUMENT.tolist()
    cue = list(of.prompt[-8:])
    at = next(i for i in range(len(document)) if document[i : i + 8] == cue) + 8
    return tuple(document[at : at + NUM_TOKENS])
