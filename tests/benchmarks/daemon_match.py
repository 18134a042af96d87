"""A warm match in process, over comparing the same bytes once (memcmp)."""

from __future__ import annotations

import operator
import random

from kvd_shared.refs import TOKEN_BYTES
from tests.benchmarks.harness import Report, Row
from tests.benchmarks.timing import Stopwatch
from tests.benchmarks.workload import (
    DOCUMENT_PAGES,
    GARDEN_SEED,
    PAGE_SIZE,
    PAGE_TOKEN_BYTES,
    Garden,
    Tokens,
    copied,
    filled,
    settle,
)

POOL = 1_000_000  # pages
LIMITS: dict[int, tuple[float | None, float | None]] = {  # tokens: times memcmp, target and aim
    1024: (None, None),
    8192: (None, None),
    32768: (4.0, 2.0),
    131072: (2.5, 1.5),
}
BATCHES, ROUNDS = 100, 30
MANY = 4000  # documents of 4 KB: more than a second-level cache holds


def matches(report: Report) -> None:
    """Rows: a match of a cached prompt, which finds every page of it, over memcmp.

    The prompt, what it is compared with and what memcmp compares are three buffers of equal
    content: comparing an object with itself would read no memory at all.
    """
    report.say(f"filling a pool of {POOL:,} pages")
    garden = filled(POOL, sum(LIMITS) // PAGE_SIZE)
    tokens = Tokens(7)
    documents = {n: tokens.take(n) for n in LIMITS}
    for document in documents.values():
        garden.store(document)
    settle()
    report.say("warm matches and memcmp")
    watches = {n: (Stopwatch(), Stopwatch()) for n in LIMITS}
    pairs = {n: (copied(documents[n]), copied(documents[n])) for n in LIMITS}
    prompts = {n: copied(documents[n]) + tokens.take(1) for n in LIMITS}  # the last never matches
    for _ in range(BATCHES):
        for n, (match, memcmp) in watches.items():
            memcmp.batch()
            for _ in range(ROUNDS):
                assert memcmp.time(operator.eq, *pairs[n])
            match.batch()
            for _ in range(ROUNDS):
                _match(garden, match, prompts[n])
    for n, (match, memcmp) in watches.items():
        name = f"match, warm, {n // 1024}k tokens: over memcmp"
        report.add(_row(name, n, match, memcmp, LIMITS[n]))
    report.say("warm matches of documents that no cache of the processor has")
    match, memcmp = Stopwatch(), Stopwatch()
    documents_again = Tokens(GARDEN_SEED)  # the first ones that the pool was filled with
    raw = [documents_again.pages(DOCUMENT_PAGES) for _ in range(MANY)]
    random.Random(1).shuffle(raw)
    others = [copied(document) + tokens.take(1) for document in raw]
    copies = [copied(document) for document in raw]
    for one, other in zip(raw, copies, strict=True):
        assert memcmp.time(operator.eq, one, other)
    for prompt in others:
        _match(garden, match, prompt)
    name = "match, warm, 1k tokens, each another document: over memcmp"
    report.add(_row(name, DOCUMENT_PAGES * PAGE_SIZE, match, memcmp, (None, None)))


def _match(garden: Garden, watch: Stopwatch, prompt: bytes) -> None:
    found = watch.time(garden.match, prompt)
    if found.num_matched_pages != len(prompt) // PAGE_TOKEN_BYTES:
        raise RuntimeError("not every page of the prompt was found")
    garden.let_go(found)


def _row(
    name: str,
    tokens: int,
    match: Stopwatch,
    memcmp: Stopwatch,
    limits: tuple[float | None, float | None],
) -> Row:
    timing, baseline = match.timing(), memcmp.timing()
    ratio = round(timing.p50_us / baseline.p50_us, 3)
    return Row(
        name=name,
        value=ratio,
        unit="x",
        target=limits[0],
        aim=limits[1],
        details={
            "pages": POOL,
            "tokens": tokens,
            **timing.to_json(),
            "baseline": f"memcmp of {tokens * TOKEN_BYTES} bytes",
            "baseline_us": round(baseline.p50_us, 3),
            "ratio": ratio,
        },
    )
