"""What a worker may ask: one function an operation, from wire arguments to a wire result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvd.arguments import Arguments
from kvd.cache import CacheManager
from kvd.results import Match
from kvd.session import Session
from kvd_shared.errors import BadRequest, KvdError, brief, error_to_wire
from kvd_shared.verbs import MAX_CALLS_A_STEP
from kvd_shared.wire import Frames

Result = dict[str, Any]  # arrays as bytes; the RPC server puts them into frames
Operation = Callable[[CacheManager, Session, Arguments, float], Result]


def match(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), args.tokens()
    args.done()
    return _matched(cache.match(session, namespace, tokens))


def probe(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), args.tokens()
    args.done()
    return {"matched_tokens": cache.probe(session, namespace, tokens)}


def acquire(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), args.tokens()
    num_pages, request = args.number("num_pages"), args.optional_number("request")
    args.done()
    return _matched(cache.acquire(session, namespace, tokens, num_pages, request))


def allocate(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    num_pages, request = args.number("num_pages"), args.optional_number("request")
    args.done()
    return {"refs": cache.allocate(session, num_pages, request)}


def share(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    refs = args.refs()
    args.done()
    cache.share(session, refs)
    return {}


def free(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    refs = args.refs()
    args.done()
    cache.free(session, refs, now)
    return {}


def publish(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens, refs = args.namespace(), args.tokens(), args.refs()
    after = args.optional_ref("after")
    args.done()
    done = cache.publish(session, namespace, tokens, refs, after)
    return {"refs": done.refs, "num_new": done.num_new, "num_duplicates": done.num_duplicates}


def begin(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    count = args.number("count")
    args.done()
    return {"request": cache.begin(session, count)}


def end(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    request = args.number("request")
    args.done()
    cache.end(session, request)
    return {}


def yielded(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    request = args.number("request")
    args.done()
    cache.yielded(session, request)
    return {}


def _matched(found: Match) -> Result:
    return {
        "refs": found.refs,
        "num_matched_pages": found.num_matched_pages,
        "matched_tokens": found.matched_tokens,
        "stop": found.stop,
    }


OPERATIONS: dict[str, Operation] = {
    f.__name__: f
    for f in (match, probe, acquire, allocate, share, free, publish, begin, end, yielded)
}


def step(
    cache: CacheManager, session: Session, args: Arguments, frames: Frames, now: float
) -> list[Result]:
    """Many operations in the order given, so that a sequence can publish and then free, and what
    is given back first can be had behind it. One entry an operation: `{"result": …}` or
    `{"error": …}`; each is atomic by itself."""
    calls = args.take("calls")
    args.done()
    if not isinstance(calls, list) or len(calls) > MAX_CALLS_A_STEP:
        raise BadRequest(f"step: calls must be a list of at most {MAX_CALLS_A_STEP} operations")
    results: list[Result] = []
    for call in calls:
        try:
            if not isinstance(call, dict) or call.keys() != {"op", "args"}:
                raise BadRequest("step: an operation is a map with exactly op and args")
            operation = OPERATIONS.get(call["op"]) if isinstance(call["op"], str) else None
            if operation is None:
                raise BadRequest(f"step: no operation {brief(call['op'])}")
            arguments = Arguments(call["op"], call["args"], frames)
            results.append({"result": operation(cache, session, arguments, now)})
        except KvdError as e:
            results.append({"error": error_to_wire(e)})
    return results
