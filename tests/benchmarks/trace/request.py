"""One request of a trace, as the replay needs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """`blocks`: the prompt's blocks of 512 tokens by number, as trace files have them. A number
    stands for the tokens of its block and all before it, so it always follows the same one."""

    at_s: float
    blocks: tuple[int, ...]


Trace = list[Request]
