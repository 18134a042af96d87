"""The operations as a client calls them: `client.call(verbs.match(namespace, tokens))`.

Each function builds one `Call`, which knows its wire form and how to read its reply.
docs/protocol.md describes the same messages for authors of clients in other languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from kvd_shared.admin_verbs import (
    audit,
    evict,
    explain,
    flush,
    kill_session,
    pages,
    raise_weights_version,
    release_prompt,
    retain_prompt,
    retained,
    sessions,
    status,
    tree,
    who_holds,
)
from kvd_shared.calls import (
    Call,
    Result,
    StepCall,
    prompt,
    read_counts,
    read_nothing,
    read_one,
    read_refs,
    ref_bytes,
    token_bytes,
)
from kvd_shared.namespace import Namespace
from kvd_shared.refs import PageRefs
from kvd_shared.results import ExtendResult, ForkResult, MatchResult, PublishResult, Retention
from kvd_shared.wire import Frames, read_array

__all__ = [  # besides the operations of role worker, which are defined here
    "Call",
    "ExtendResult",
    "ForkResult",
    "MatchResult",
    "PublishResult",
    "Retention",
    "audit",
    "evict",
    "explain",
    "flush",
    "kill_session",
    "pages",
    "raise_weights_version",
    "release_prompt",
    "retain_prompt",
    "retained",
    "sessions",
    "status",
    "tree",
    "who_holds",
]

MAX_CALLS_A_STEP = 4096
MAX_DECLARED = 4096  # pages in one declare


# --- pages and prompts


def match(
    namespace: Namespace, tokens: npt.ArrayLike, min_partial: int | None = None
) -> Call[MatchResult]:
    """Hold the longest cached prefix of `tokens` (int32[n]): whole pages, at most n-1 tokens. With
    `min_partial`, also the page that continues it with at least so many tokens."""
    return Call("match", prompt(namespace, tokens) | {"min_partial": min_partial}, _read_match)


def probe(namespace: Namespace, tokens: npt.ArrayLike) -> Call[int]:
    """How many tokens `match` would find now. Holds nothing."""
    return Call("probe", prompt(namespace, tokens), lambda r, _: int(r["matched_tokens"]))


def acquire(
    namespace: Namespace,
    tokens: npt.ArrayLike,
    num_pages: int,
    request: int | None = None,
    *,
    min_partial: int | None = None,
    announce: bool = False,
    own_rate: float | None = None,
) -> Call[MatchResult]:
    """Match, and allocate the rest up to `num_pages` in all. Both, or NoPages and neither.

    `announce`: others may wait for what this request computes of the prompt. `own_rate` (tokens/s
    that the caller computes): if another request computes more of the prompt and will be sooner,
    hold nothing and wait for it: the result's `stop` is "pending", and notices tell of its
    progress; ask again on "ready" or "ended", or when it takes too long.
    """
    args = prompt(namespace, tokens) | {"num_pages": num_pages, "request": request}
    args |= {"min_partial": min_partial, "announce": announce, "own_rate": own_rate}
    return Call("acquire", args, _read_match)


def allocate(num_pages: int, request: int | None = None) -> Call[PageRefs]:
    """New pages of the session's own to write, or NoPages."""
    return Call("allocate", {"num_pages": num_pages, "request": request}, read_refs)


def lease(num_pages: int, request: int | None = None) -> Call[PageRefs]:
    """New pages ahead of need, or NoPages. Say `use` before writing them."""
    return Call("lease", {"num_pages": num_pages, "request": request}, read_refs)


def use(refs: npt.ArrayLike) -> Call[None]:
    """Leased pages are written from now on."""
    return Call("use", {"refs": ref_bytes(refs)}, read_nothing)


def share(refs: npt.ArrayLike) -> Call[None]:
    """One hold more on each page. Raises NotHeld if the session does not hold one of them."""
    return Call("share", {"refs": ref_bytes(refs)}, read_nothing)


def free(refs: npt.ArrayLike) -> Call[None]:
    """One hold less on each page. Raises NotHeld on a double free or a stale generation."""
    return Call("free", {"refs": ref_bytes(refs)}, read_nothing)


def publish(
    namespace: Namespace,
    tokens: npt.ArrayLike,
    refs: npt.ArrayLike,
    after: int | None = None,
    retention: Retention | None = None,
) -> Call[PublishResult]:
    """Seal full pages, whose bytes are complete, and make them matchable.

    `tokens` are the pages' tokens. `after` is the reference of the page before them in the same
    sequence, which is in the tree and held; None if the pages start at token 0. Raises StaleVersion
    or Detached where their KV is not wanted any more: compute on, and publish no more of it.
    """
    args = prompt(namespace, tokens) | {"refs": ref_bytes(refs), "after": after}
    return Call("publish", args | {"retention": retention and retention.to_wire()}, _read_publish)


def retain(refs: npt.ArrayLike, retention: Retention) -> Call[None]:
    """Let a wish hold for pages that are in the tree and held by the session."""
    args = {"refs": ref_bytes(refs), "retention": retention.to_wire()}
    return Call("retain", args, read_nothing)


# --- branching and handing over


def fork(
    refs: npt.ArrayLike, num_tokens: int, count: int, request: int | None = None
) -> Call[PageRefs]:
    """`count` more sequences with the same `num_tokens` tokens, which the pages `refs` hold: one
    hold more on the full ones, and for each a new page to copy the last one into (none if that is
    full)."""
    args = {"refs": ref_bytes(refs), "num_tokens": num_tokens, "count": count, "request": request}
    return Call("fork", args, read_refs)


def make_writable(ref: int, request: int | None = None) -> Call[int]:
    """A page to write in place of `ref`: itself, or where others hold it or it is sealed a new
    one: copy it there, then free `ref`."""
    args = {"ref": ref, "request": request}
    return Call("make_writable", args, lambda r, _: int(r["ref"]))


def seal_tail(ref: int, num_tokens: int) -> Call[None]:
    """A page that is not full is complete with so many tokens, for handing it over."""
    return Call("seal_tail", {"ref": ref, "num_tokens": num_tokens}, read_nothing)


def hand_over(refs: npt.ArrayLike, ttl_s: float = 60.0) -> Call[bytes]:
    """Give a hold on each of these sealed pages to whoever brings the returned ticket in time."""
    args = {"refs": ref_bytes(refs), "ttl_s": ttl_s}
    return Call("hand_over", args, lambda r, f: read_array(r["ticket"], f, 1, "ticket"))


def take_over(ticket: bytes) -> Call[tuple[PageRefs, int]]:
    """The ticket's pages, and how many tokens its last page has if that is a sealed tail (else 0).
    Copy a tail with `make_writable` before going on."""
    read = lambda r, f: (read_refs(r, f), int(r["tail_tokens"]))  # noqa: E731  (two values)
    return Call("take_over", {"ticket": ticket}, read)


# --- requests


def begin(count: int = 1) -> Call[int]:
    """Number `count` sequences host-wide by age; returns the first of consecutive numbers.

    Whoever begins requests heeds yield notices: publish the named sequence's full pages, free all
    its pages, say `yielded`, and queue it again.
    """
    return Call("begin", {"count": count}, lambda r, _: int(r["request"]))


def end(request: int) -> Call[None]:
    """The sequence is over; free its pages first, or in the same step."""
    return Call("end", {"request": request}, read_nothing)


def yielded(request: int) -> Call[None]:
    """The sequence has freed its pages and waits again, with its old number."""
    return Call("yielded", {"request": request}, read_nothing)


def announce(request: int, namespace: Namespace, tokens: npt.ArrayLike) -> Call[None]:
    """A request that has pages computes these tokens: others may wait for them."""
    return Call("announce", prompt(namespace, tokens) | {"request": request}, read_nothing)


def wait(
    request: int, namespace: Namespace, tokens: npt.ArrayLike, own_rate: float
) -> Call[MatchResult | None]:
    """Wait for what others compute of the prompt, if that is sooner than `own_rate` tokens/s; None:
    there is nothing to wait for. The request holds no pages."""
    args = prompt(namespace, tokens) | {"request": request, "own_rate": own_rate}
    return Call("wait", args, lambda r, f: _read_match(r, f) if r["stop"] == "pending" else None)


# --- server-side sequences


def open_sequence(
    namespace: Namespace,
    tokens: npt.ArrayLike,
    request: int | None = None,
    *,
    ahead: int = 0,
    min_partial: int | None = None,
    announce: bool = False,
    own_rate: float | None = None,
) -> Call[tuple[int, MatchResult]]:
    """`acquire` for the tokens' pages and `ahead` more, and a handle (0 if the request waits)."""
    args = prompt(namespace, tokens) | {"request": request, "ahead": ahead}
    args |= {"min_partial": min_partial, "announce": announce, "own_rate": own_rate}
    return Call("open_sequence", args, lambda r, f: (int(r["sequence"]), _read_match(r, f)))


def extend(
    sequences: npt.ArrayLike, computed: npt.ArrayLike, counts: npt.ArrayLike, tokens: npt.ArrayLike
) -> Call[ExtendResult]:
    """For each sequence (int64[n]): its first `computed` (int32[n]) tokens have their K and V in
    the pages, and `counts` (int32[n]) new ones follow, all rows' in `tokens`. What is full is
    published; what the tokens need is given, and leased ahead."""
    args = {
        "sequences": ref_bytes(sequences),
        "computed": token_bytes(computed),
        "counts": token_bytes(counts),
        "tokens": token_bytes(tokens),
    }
    return Call("extend", args, _read_extend)


def fork_sequence(sequence: int, requests: Sequence[int | None]) -> Call[ForkResult]:
    """One more sequence for each request number (None: none), with the same tokens."""
    count = len(requests)
    args = {"sequence": sequence, "requests": list(requests)}

    def read(r: Result, f: Frames) -> ForkResult:
        refs = read_refs(r, f).reshape(count, -1)
        return ForkResult(r["sequences"], refs, r["copy_from"])

    return Call("fork_sequence", args, read)


def close_sequences(sequences: npt.ArrayLike) -> Call[None]:
    """Publish what is full of them and free their pages: they are over, or yield."""
    return Call("close_sequences", {"sequences": ref_bytes(sequences)}, read_nothing)


# --- many at once, and the end


def step(calls: Sequence[Call[Any]]) -> Call[list[Any]]:
    """Many operations in one round trip, in the order given, each atomic by itself. The result has
    one entry an operation: its result, or the KvdError it raised. Give back first, then ask."""

    def read(result: Result, frames: Frames) -> list[Any]:
        return [read_one(c, r, frames) for c, r in zip(calls, result["results"], strict=True)]

    return StepCall("step", {"calls": calls}, read)


def detach() -> Call[None]:
    """The session unmaps the pool and is over; all that it held comes back at once."""
    return Call("detach", {}, read_nothing)


def declare(refs: npt.ArrayLike, counts: npt.ArrayLike, done: bool = True) -> Call[PageRefs]:
    """Of a session that has resumed: it holds these pages, so often each; nothing else may be asked
    before `done`. At most MAX_DECLARED pages a call. Returns those that it cannot have; see
    KvdClient.resume, which sends this."""

    def read(r: Result, frames: Frames) -> PageRefs:
        return read_refs(r, frames, "refused")

    args = {"refs": ref_bytes(refs), "counts": token_bytes(counts), "done": done}
    return Call("declare", args, read)


def _read_match(r: Result, frames: Frames) -> MatchResult:
    return MatchResult(
        read_refs(r, frames),
        r["num_matched_pages"],
        r["matched_tokens"],
        r["stop"],
        r.get("partial_ref"),
        r.get("partial_tokens", 0),
        r.get("pending_tokens", 0),
        r.get("pending_s"),
    )


def _read_publish(r: Result, frames: Frames) -> PublishResult:
    return PublishResult(read_refs(r, frames), r["num_new"], r["num_duplicates"])


def _read_extend(r: Result, frames: Frames) -> ExtendResult:
    codes = r["codes"]
    return ExtendResult(
        [codes[i] for i in read_array(r["status"], frames, 1, "status")],
        read_counts(r, frames, "num_new"),
        read_refs(r, frames),
        read_counts(r, frames, "swap_rows"),
        read_counts(r, frames, "swap_places"),
        read_refs(r, frames, "swap_refs"),
    )
