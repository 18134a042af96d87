"""What the HTTP side and the engine say to each other. Neither knows the other's inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from kvd_shared.errors import BadRequest, KvdError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    temperature 0 is greedy. `seed` None draws a fresh one. `stop` strings end the text before
    their first appearance. `top_k` 0 and `top_p` 1 keep every token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises BadRequest for a value that means nothing."""
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "stop": (all(self.stop), "no empty string"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise BadRequest(f"{name} = {getattr(self, name)!r}: must be {wanted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """`n` continuations of one prompt. `salt` separates tenants: KV is shared only within one."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    n: int = 1
    salt: bytes = b""
    use_cache: bool = True  # False neither matches nor publishes


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of continuation `index`; may be empty while a character or stop string is open."""

    index: int
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Continuation `index` is complete. The last event of that index."""

    index: int
    reason: FinishReason
    num_generated: int
    cached_tokens: int  # of the prompt, found in the shared cache when it was first admitted


@dataclass(frozen=True, slots=True)
class Failed:
    """The whole request ended with a typed error. The last event of the request."""

    error: KvdError


Event = Delta | Finished | Failed
Emit = Callable[[Event], None]


class RequestTooLong(KvdError):
    """Prompt and max_tokens do not fit the model's context or the pool. HTTP 413."""

    code = "REQUEST_TOO_LONG"


class QueueFull(KvdError):
    """As many sequences wait as are allowed to. HTTP 429."""

    code = "QUEUE_FULL"
    retryable = True


class BadLogits(KvdError):
    """The model computed NaN or infinity: broken weights, or a KV dtype that is too narrow."""

    code = "BAD_LOGITS"


class Engine(Protocol):
    """The engine as the HTTP side sees it. All methods may be called from any thread."""

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        """Queue a request. `emit` is called from the engine's thread with its events.

        Raises RequestTooLong, QueueFull, or a retryable KvdError when the daemon has been away for
        too long.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request and give its pages back; unknown ids are ignored (it just ended)."""
        ...

    def health(self) -> dict[str, object]:
        """`{"status": "ok" | "away" | "detached" | "stopping", "running": n, "waiting": n, ...}`.
        Detached is away for too long."""
        ...
