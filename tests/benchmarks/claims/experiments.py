"""The two experiments, and what they find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from modelworker.cli import SHIPPED_MODEL
from tests.benchmarks.claims import modes, sharing
from tests.benchmarks.claims.answers import unexplained
from tests.benchmarks.claims.conversations import Request, endless_cache, sample, to_asks
from tests.benchmarks.claims.plan import Ask, Outcome, Plan
from tests.benchmarks.claims.sharing import Shared
from tests.benchmarks.claims.world import BenchWorker, running_world
from tests.daemon import RunningDaemon

World = tuple[RunningDaemon, list[BenchWorker]]
SYSTEM_PROMPTS = (128, 256, 512, 768)  # tokens
# Behind the reservations the engine computes over pages all the same; these keep what rounding up
# to whole pages takes from ever being a limit.
SPARE_PAGES = 512


@dataclass(slots=True)
class Facts:
    """Each list has one entry a seed."""

    outcomes: dict[str, list[Outcome]] = field(
        default_factory=lambda: {mode.name: [] for mode in modes.MODES}
    )
    prompt_tokens: list[int] = field(default_factory=list)
    endless: list[float] = field(default_factory=list)  # what a cache without limits would find
    system: dict[int, list[tuple[Shared, Shared]]] = field(  # nothing shared, shared
        default_factory=lambda: {tokens: [] for tokens in SYSTEM_PROMPTS}
    )
    num_answers: int = 0  # compared with another mode's
    num_different: int = 0
    contiguous_saves: float = 0.0


def paged_world(folder: Path) -> AbstractContextManager[World]:
    folder.mkdir()
    num_pages = modes.NUM_SLOTS // modes.PAGE_SIZE
    return running_world(folder, SHIPPED_MODEL, num_pages, modes.PAGE_SIZE, ("left", "right"))


def reserving_world(folder: Path) -> AbstractContextManager[World]:
    folder.mkdir()
    num_pages = modes.NUM_SLOTS // modes.PAGE_SIZE + SPARE_PAGES
    return running_world(folder, SHIPPED_MODEL, num_pages, modes.PAGE_SIZE, ("reserving",))


def warm_up(worlds: Sequence[World]) -> None:
    """What a process does once is not to be measured."""
    ask = Ask(tuple(range(2, 300)), 4)
    for _, workers in worlds:
        for worker in workers:
            worker.run(Plan(asks=(ask,) * 4, salt="warm-up", alone=True))


def conversations(
    facts: Facts,
    trace: Sequence[Request],
    num_requests: int,
    seed: int,
    worlds: tuple[World, World],
    say: Callable[[str], None],
) -> None:
    """The same requests in every mode, the pool full, as fast as they go."""
    asks = to_asks(sample(trace, num_requests, seed), seed)
    facts.prompt_tokens.append(sum(len(ask.prompt) for ask in asks))
    facts.endless.append(endless_cache(asks, modes.PAGE_SIZE))
    turn = seed % len(modes.MODES)  # so that a machine that warms up or slows down favours none
    for mode in modes.MODES[turn:] + modes.MODES[:turn]:
        say(f"seed {seed}: {len(asks)} requests, {mode.name}")
        _, workers = worlds[mode.reserve is not None]
        facts.outcomes[mode.name].append(workers[0].run(mode.plan(asks, f"{mode.name} {seed}")))
    first, *others = (outcomes[-1].answers for outcomes in facts.outcomes.values())
    for other in others:
        facts.num_answers += len(asks)
        facts.num_different += unexplained(asks, first, other)


def system_prompts(facts: Facts, seed: int, world: World, say: Callable[[str], None]) -> None:
    """Many users of one system prompt at once, in two workers of one pool."""
    for tokens, measured in facts.system.items():
        say(f"seed {seed}: {sharing.NUM_USERS} users of a system prompt of {tokens} tokens")
        asks = sharing.users(tokens, seed)
        alone, shared = (sharing.measure(*world, asks, share) for share in (False, True))
        measured.append((alone, shared))
        facts.num_answers += len(asks)
        facts.num_different += unexplained(asks, alone.answers, shared.answers)
