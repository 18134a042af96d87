"""What the benchmark asks of a worker process, and what it hears: one JSON line each way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. It ends after `num_tokens`: the length that the trace knows, where a client
    would have seen an end-of-text token. Nobody but the engine's last step knows it before."""

    prompt: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A list of requests, all there from the start.

    `salt`: a name of the run; its requests find nothing of other runs. `alone`: nor anything of
    each other. `reserve`: slots of each request, from an `allocator` of `num_slots`; None: paged.
    """

    asks: tuple[Ask, ...]
    salt: str
    alone: bool = False
    allocator: Literal["first-fit", "buddy"] | None = None
    num_slots: int = 0
    reserve: tuple[int, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields = json.loads(text)
        fields["asks"] = tuple(Ask(tuple(a["prompt"]), a["num_tokens"]) for a in fields["asks"])
        fields["reserve"] = tuple(fields["reserve"])
        return cls(**fields)


@dataclass(slots=True)
class Usage:
    """Sequences that run, slots that are taken (each page once), and those of them whose token is
    known: at one moment, or their means over time."""

    running: float = 0
    taken: float = 0
    used: float = 0

    @property
    def waste(self) -> float:
        """Of the slots that are taken, the share that no token is in."""
        return 1 - self.used / self.taken

    def add(self, other: Usage, weight: float) -> None:
        self.running += weight * other.running
        self.taken += weight * other.taken
        self.used += weight * other.used


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run took. `usage`: means over the time while requests waited for room, None where
    none ever did. `cached_tokens`: found at the first admission of each request."""

    wall_s: float
    cpu_s: float  # of the worker process
    num_steps: int
    computed_tokens: int
    cached_tokens: int
    usage: Usage | None
    answers: list[list[int]] = field(repr=False)

    @property
    def memory(self) -> Usage:
        """Raises ValueError where memory was no limit: such a run shows nothing."""
        if self.usage is None:
            raise ValueError("no request ever waited for memory: run with more requests")
        return self.usage

    @property
    def tokens_a_step(self) -> float:
        """Generated ones."""
        return sum(map(len, self.answers)) / self.num_steps

    @property
    def tokens_a_second(self) -> float:
        """Of the worker's CPU time: on a machine that others use too, wall time says less."""
        return sum(map(len, self.answers)) / self.cpu_s

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        fields = json.loads(text)
        if fields["usage"] is not None:
            fields["usage"] = Usage(**fields["usage"])
        return cls(**fields)
