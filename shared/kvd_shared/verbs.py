"""The operations as a client calls them: `client.call(verbs.match(namespace, tokens))`.

Each function builds one `Call`, which knows its wire form and how to read its reply.
docs/protocol.md describes the same messages for authors of clients in other languages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from kvd_shared.errors import KvdError, error_from_wire
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, PageRefs, TokenIds, refs_from_bytes
from kvd_shared.wire import Frames, FrameWriter, read_array

T = TypeVar("T")
MAX_CALLS_A_STEP = 4096
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One operation: its name, its arguments (arrays as bytes), and the reading of its result."""

    op: str
    args: dict[str, Any]
    read: Callable[[Result, Frames], T]

    def to_wire(self, writer: FrameWriter) -> dict[str, Any]:
        return {"op": self.op, "args": arrays_out(self.args, writer)}


def arrays_out(fields: dict[str, Any], writer: FrameWriter) -> dict[str, Any]:
    """A map with its arrays (bytes) put inline or into raw frames."""
    return {k: writer.array(v) if type(v) is bytes else v for k, v in fields.items()}


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Pages that the session now holds.

    `refs` are int64[matched pages + allocated pages]; the first `num_matched_pages` hold the
    `matched_tokens` first tokens of the prompt and are never to be written.
    """

    refs: PageRefs
    num_matched_pages: int
    matched_tokens: int
    stop: str  # "limit" or "not_cached"


@dataclass(frozen=True, slots=True)
class PublishResult:
    """`refs` are the canonical pages, int64[pages published]. Where they differ from what was
    sent, they are held in addition: swap the block table, then free the page that was sent."""

    refs: PageRefs
    num_new: int
    num_duplicates: int


def match(namespace: Namespace, tokens: npt.ArrayLike) -> Call[MatchResult]:
    """Hold the longest cached prefix of `tokens` (int32[n]): whole pages, at most n-1 tokens."""
    return Call("match", _prompt(namespace, tokens), _read_match)


def probe(namespace: Namespace, tokens: npt.ArrayLike) -> Call[int]:
    """How many tokens `match` would find now. Holds nothing."""
    return Call("probe", _prompt(namespace, tokens), lambda r, _: int(r["matched_tokens"]))


def acquire(
    namespace: Namespace, tokens: npt.ArrayLike, num_pages: int, request: int | None = None
) -> Call[MatchResult]:
    """Match, and allocate the rest up to `num_pages` in all. Both, or NoPages and neither."""
    args = _prompt(namespace, tokens) | {"num_pages": num_pages, "request": request}
    return Call("acquire", args, _read_match)


def allocate(num_pages: int, request: int | None = None) -> Call[PageRefs]:
    """New pages of the session's own to write, or NoPages."""
    args = {"num_pages": num_pages, "request": request}
    return Call("allocate", args, _refs)


def share(refs: npt.ArrayLike) -> Call[None]:
    """One hold more on each page. Raises NotHeld if the session does not hold one of them."""
    return Call("share", {"refs": _ref_bytes(refs)}, _read_nothing)


def free(refs: npt.ArrayLike) -> Call[None]:
    """One hold less on each page. Raises NotHeld on a double free or a stale generation."""
    return Call("free", {"refs": _ref_bytes(refs)}, _read_nothing)


def publish(
    namespace: Namespace, tokens: npt.ArrayLike, refs: npt.ArrayLike, after: int | None = None
) -> Call[PublishResult]:
    """Seal full pages, whose bytes are complete, and make them matchable.

    `tokens` are the pages' tokens. `after` is the reference of the page before them in the same
    sequence, which is in the tree and held; None if the pages start at token 0.
    """
    args = _prompt(namespace, tokens) | {"refs": _ref_bytes(refs), "after": after}
    return Call("publish", args, _read_publish)


def begin(count: int = 1) -> Call[int]:
    """Number `count` sequences host-wide by age; returns the first of consecutive numbers.

    Whoever begins requests heeds yield notices: publish the named sequence's full pages, free all
    its pages, say `yielded`, and queue it again.
    """
    return Call("begin", {"count": count}, lambda r, _: int(r["request"]))


def end(request: int) -> Call[None]:
    """The sequence is over; free its pages first, or in the same step."""
    return Call("end", {"request": request}, _read_nothing)


def yielded(request: int) -> Call[None]:
    """The sequence has freed its pages and waits again, with its old number."""
    return Call("yielded", {"request": request}, _read_nothing)


def step(calls: Sequence[Call[Any]]) -> Call[list[Any]]:
    """Many operations in one round trip, in the order given, each atomic by itself. The result has
    one entry an operation: its result, or the KvdError it raised. Give back first, then ask."""

    def read(result: Result, frames: Frames) -> list[Any]:
        return [_read_one(c, r, frames) for c, r in zip(calls, result["results"], strict=True)]

    return _StepCall("step", {"calls": calls}, read)


def detach() -> Call[None]:
    """The session unmaps the pool and is over; all that it held comes back at once."""
    return Call("detach", {}, _read_nothing)


def status() -> Call[Result]:
    """The daemon and its pools in numbers. Role admin, like all that follow."""
    return Call("status", {}, _read_map)


def pages(pool: str | None = None) -> Call[Result]:
    """A pool's page counts and its map, one byte a page."""
    return Call("pages", {"pool": pool}, _read_pages)


def tree(pool: str | None = None, max_nodes: int = 1000) -> Call[Result]:
    """The radix tree of a pool, at most `max_nodes` nodes."""
    return Call("tree", {"pool": pool, "max_nodes": max_nodes}, _read_map)


def sessions() -> Call[Result]:
    """Who is attached, and what they hold."""
    return Call("sessions", {}, _read_map)


def audit(pool: str | None = None) -> Call[Result]:
    """Check all invariants of a pool: `{"ok": bool, "finding": str | None}`."""
    return Call("audit", {"pool": pool}, _read_map)


class _StepCall(Call[list[Any]]):
    def to_wire(self, writer: FrameWriter) -> dict[str, Any]:
        calls = [call.to_wire(writer) for call in self.args["calls"]]
        return {"op": self.op, "args": {"calls": calls}}


def _prompt(namespace: Namespace, tokens: npt.ArrayLike) -> dict[str, Any]:
    ids: TokenIds = np.asarray(tokens, dtype="<i4")
    return {"namespace": namespace.to_wire(), "tokens": ids.tobytes()}


def _ref_bytes(refs: npt.ArrayLike) -> bytes:
    return np.asarray(refs, dtype="<i8").tobytes()


def _refs(result: Result, frames: Frames) -> PageRefs:
    return refs_from_bytes(read_array(result["refs"], frames, REF_BYTES, "refs"))


def _read_match(r: Result, frames: Frames) -> MatchResult:
    return MatchResult(_refs(r, frames), r["num_matched_pages"], r["matched_tokens"], r["stop"])


def _read_publish(r: Result, frames: Frames) -> PublishResult:
    return PublishResult(_refs(r, frames), r["num_new"], r["num_duplicates"])


def _read_pages(r: Result, frames: Frames) -> Result:
    return r | {"map": read_array(r["map"], frames, 1, "map")}


def _read_nothing(_: Result, __: Frames) -> None:
    return None


def _read_map(r: Result, _: Frames) -> Result:
    return r


def _read_one(call: Call[Any], reply: dict[str, Any], frames: Frames) -> Any:
    if "error" in reply:
        return error_from_wire(reply["error"])
    result: Any = call.read(reply["result"], frames)
    assert not isinstance(result, KvdError)
    return result
