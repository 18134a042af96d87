"""The operations of role admin; observers have the reads but `explain`. Call them as those of
`kvd_shared.verbs`."""

from __future__ import annotations

import numpy.typing as npt

from kvd_shared.calls import Call, Result, prompt, read_map
from kvd_shared.namespace import Namespace
from kvd_shared.wire import Frames, read_array

# --- reads


def status() -> Call[Result]:
    """The daemon and its pools in numbers."""
    return Call("status", {}, read_map)


def pages(pool: str | None = None) -> Call[Result]:
    """A pool's page counts and its map, one byte a page."""
    return Call("pages", {"pool": pool}, _read_pages)


def tree(pool: str | None = None, max_nodes: int = 1000) -> Call[Result]:
    """The radix tree of a pool, at most `max_nodes` nodes."""
    return Call("tree", {"pool": pool, "max_nodes": max_nodes}, read_map)


def sessions() -> Call[Result]:
    """Who is attached, and what they hold."""
    return Call("sessions", {}, read_map)


def audit(pool: str | None = None) -> Call[Result]:
    """Check all invariants of a pool: `{"ok": bool, "finding": str | None, "complete": bool}`."""
    return Call("audit", {"pool": pool}, read_map)


def explain(namespace: Namespace, tokens: npt.ArrayLike, pool: str | None = None) -> Call[Result]:
    """Where a match of these tokens stops, and why."""
    return Call("explain", prompt(namespace, tokens) | {"pool": pool}, read_map)


def who_holds(page: int, pool: str | None = None) -> Call[Result]:
    """A page's state, and which sessions hold it how often."""
    return Call("who_holds", {"pool": pool, "page": page}, read_map)


def retained(pool: str | None = None) -> Call[Result]:
    """What operators keep: each with the number to release it by."""
    return Call("retained", {"pool": pool}, read_map)


# --- changes


def evict(num_pages: int, pool: str | None = None) -> Call[Result]:
    """Evict up to so many pages that nobody holds; the result's `num_pages` says how many went."""
    return Call("evict", {"pool": pool, "num_pages": num_pages}, read_map)


def flush(
    model: str | None = None,
    weights_version: int | None = None,
    adapter: bytes | None = None,
    salt: bytes | None = None,
    pool: str | None = None,
) -> Call[Result]:
    """Make the KV of the namespaces with these fields (None: any) unmatchable."""
    args = {"pool": pool, "model": model, "weights_version": weights_version}
    wire = {"adapter": adapter, "salt": salt}
    return Call("flush", args | wire, read_map)


def raise_weights_version(
    version: int, model: str | None = None, pool: str | None = None
) -> Call[Result]:
    """KV of older weights versions of the model (None: of all) is not matched or published now."""
    args = {"pool": pool, "model": model, "version": version}
    return Call("raise_weights_version", args, read_map)


def retain_prompt(
    namespace: Namespace,
    tokens: npt.ArrayLike,
    duration_s: float | None = None,
    pool: str | None = None,
) -> Call[Result]:
    """Keep what is cached of these tokens, within the operators' quota."""
    args = prompt(namespace, tokens) | {"pool": pool, "duration_s": duration_s}
    return Call("retain_prompt", args, read_map)


def release_prompt(number: int, pool: str | None = None) -> Call[Result]:
    """End what `retain_prompt` began. Raises UnknownHandle."""
    return Call("release_prompt", {"pool": pool, "number": number}, read_map)


def kill_session(session: int) -> Call[Result]:
    """End a session and kill its process (SIGKILL); what it held comes back once it is dead.
    Raises UnknownHandle, NotAllowed."""
    return Call("kill_session", {"session": session}, read_map)


def _read_pages(r: Result, frames: Frames) -> Result:
    return r | {"map": read_array(r["map"], frames, 1, "map")}
