"""What a worker may ask: one function an operation, from wire arguments to a wire result."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable, Generator
from typing import Any

from kvd.arguments import Arguments
from kvd.cache import MAX_FORKS, CacheManager
from kvd.results import Match
from kvd.retention import Retention
from kvd.sequences import STATUSES, Extended, check_rows
from kvd.session import Session
from kvd_shared.errors import BadRequest, KvdError, brief, error_to_wire
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES
from kvd_shared.verbs import MAX_CALLS_A_STEP
from kvd_shared.wire import Frames

Result = dict[str, Any]  # arrays as bytes; the RPC server puts them into frames
Sliced = Generator[None, None, Result]
Operation = Callable[[CacheManager, Session, Arguments, float], Result | Sliced]
CALLS_A_SLICE = 16  # of a step
ROWS_A_SLICE = 256  # of an extend
TICKET_LENGTH = 16  # bytes
MAX_ROWS = 4096  # sequences in one call


def match(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), _prompt(cache, args)
    min_partial = args.optional_number("min_partial")
    args.done()
    return _matched(cache.match(session, namespace, tokens, now, min_partial))


def probe(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), _prompt(cache, args)
    args.done()
    return {"matched_tokens": cache.probe(session, namespace, tokens, now)}


def acquire(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), _prompt(cache, args)
    num_pages, request = args.number("num_pages"), args.optional_number("request")
    min_partial, announce = args.optional_number("min_partial"), args.flag("announce")
    own_rate = args.optional_positive("own_rate")
    args.done()
    _charge_reply(cache, args, num_pages)
    found = cache.acquire(
        session, namespace, tokens, num_pages, request, now, min_partial, announce, own_rate
    )
    return _matched(found)


def allocate(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    num_pages, request = args.number("num_pages"), args.optional_number("request")
    args.done()
    _charge_reply(cache, args, num_pages)
    return {"refs": cache.allocate(session, num_pages, request, now)}


def lease(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    num_pages, request = args.number("num_pages"), args.optional_number("request")
    args.done()
    _charge_reply(cache, args, num_pages)
    return {"refs": cache.lease(session, num_pages, request, now)}


def use(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    refs = args.refs()
    args.done()
    cache.use(session, refs)
    return {}


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
    namespace, tokens, refs = args.namespace(), _prompt(cache, args), args.refs()
    after, retention = args.optional_ref("after"), args.optional_map("retention")
    args.done()
    wish = Retention.from_wire(retention)
    done = cache.publish(session, namespace, tokens, refs, after, now, wish)
    return {"refs": done.refs, "num_new": done.num_new, "num_duplicates": done.num_duplicates}


def retain(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    refs, retention = args.refs(), args.optional_map("retention")
    args.done()
    cache.retain(session, refs, Retention.from_wire(retention))
    return {}


def fork(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    refs, num_tokens = args.refs(), args.number("num_tokens")
    count, request = args.number("count"), args.optional_number("request")
    args.done()
    args.charge(max(count, 0) * len(refs))
    return {"refs": cache.fork(session, refs, num_tokens, count, request, now)}


def make_writable(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    ref, request = args.ref("ref"), args.optional_number("request")
    args.done()
    return {"ref": cache.make_writable(session, ref, request, now)}


def seal_tail(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    ref, num_tokens = args.ref("ref"), args.number("num_tokens")
    args.done()
    cache.seal_tail(session, ref, num_tokens)
    return {}


def hand_over(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    refs, ttl_s = args.refs(), args.seconds("ttl_s")
    args.done()
    ticket = secrets.token_bytes(TICKET_LENGTH)
    cache.handover.hand_over(session, refs, ticket, ttl_s, now)
    return {"ticket": ticket}


def take_over(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    ticket = args.array("ticket", 1)
    args.done()
    refs, tail_tokens = cache.handover.take_over(session, ticket, now)
    return {"refs": refs, "tail_tokens": tail_tokens}


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


def announce(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), _prompt(cache, args)
    request = args.number("request")
    args.done()
    cache.announce(session, request, namespace, tokens, now)
    return {}


def wait(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), _prompt(cache, args)
    request, own_rate = args.number("request"), args.positive("own_rate")
    args.done()
    found = cache.wait(session, request, namespace, tokens, own_rate, now)
    return {"stop": "nothing"} if found is None else _matched(found)


def open_sequence(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    namespace, tokens = args.namespace(), _prompt(cache, args)
    request, ahead = args.optional_number("request"), args.number("ahead")
    min_partial, announce = args.optional_number("min_partial"), args.flag("announce")
    own_rate = args.optional_positive("own_rate")
    args.done()
    handle, found = cache.sequences.open(
        session, namespace, tokens, request, ahead, now, min_partial, announce, own_rate
    )
    return {"sequence": handle} | _matched(found)


def extend(cache: CacheManager, session: Session, args: Arguments, now: float) -> Sliced:
    handles = _handles(args)
    computed = array("i", args.array("computed", TOKEN_BYTES))
    counts = array("i", args.array("counts", TOKEN_BYTES))
    tokens = args.tokens(cache.vocab_size, None)
    args.done()
    check_rows(handles, computed, counts, tokens)
    done, at = Extended(), 0
    for first in range(0, max(len(handles), 1), ROWS_A_SLICE):
        if first:
            yield
            cache.num_changes += 1
        rows = slice(first, first + ROWS_A_SLICE)
        end = at + sum(counts[rows]) * TOKEN_BYTES
        some = cache.sequences.extend(
            session, handles[rows], computed[rows], counts[rows], tokens[at:end], now
        )
        done.append(some, first)
        at = end
    return {
        "codes": STATUSES,
        "status": bytes(done.status),
        "num_new": done.num_new.tobytes(),
        "refs": done.refs.tobytes(),
        "swap_rows": done.swap_rows.tobytes(),
        "swap_places": done.swap_places.tobytes(),
        "swap_refs": done.swap_refs.tobytes(),
    }


def fork_sequence(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    sequence, requests = args.number("sequence"), args.numbers_or_nil("requests", MAX_FORKS)
    args.done()
    num_pages = len(cache.sequences.get(session, sequence).refs)
    args.charge(len(requests) * num_pages * REF_BYTES)
    handles, refs, copy_from = cache.sequences.fork(session, sequence, requests, now)
    return {"sequences": handles, "refs": refs, "copy_from": copy_from}


def close_sequences(cache: CacheManager, session: Session, args: Arguments, now: float) -> Result:
    handles = _handles(args)
    args.done()
    cache.sequences.close(session, handles, now)
    return {}


def _prompt(cache: CacheManager, args: Arguments) -> bytes:
    return args.tokens(cache.vocab_size, cache.options.limits.max_prompt_tokens)


def _handles(args: Arguments) -> array[int]:
    handles = array("q", args.array("sequences", REF_BYTES))
    if len(handles) > MAX_ROWS:
        raise BadRequest(f"{len(handles)} sequences: at most {MAX_ROWS} in one call")
    return handles


def _charge_reply(cache: CacheManager, args: Arguments, num_pages: int) -> None:
    """The references of new pages have to fit a reply, for once it is written they are given."""
    args.charge(min(max(num_pages, 0), cache.num_pages) * REF_BYTES)


def _matched(found: Match) -> Result:
    return {
        "refs": found.refs,
        "num_matched_pages": found.num_matched_pages,
        "matched_tokens": found.matched_tokens,
        "stop": found.stop,
        "partial_ref": found.partial_ref,
        "partial_tokens": found.partial_tokens,
        "pending_tokens": found.pending_tokens,
        "pending_s": found.pending_s,
    }


OPERATIONS: dict[str, Operation] = {
    f.__name__: f
    for f in (
        match,
        probe,
        acquire,
        allocate,
        lease,
        use,
        share,
        free,
        publish,
        retain,
        fork,
        make_writable,
        seal_tail,
        hand_over,
        take_over,
        begin,
        end,
        yielded,
        announce,
        wait,
        open_sequence,
        extend,
        fork_sequence,
        close_sequences,
    )
}


def step(
    cache: CacheManager, session: Session, args: Arguments, frames: Frames, now: float
) -> Generator[None, None, Result]:
    """Many operations in the order given, so that a sequence can publish and then free, and what
    is given back first can be had behind it. One entry an operation: `{"result": …}` or
    `{"error": …}`; each is atomic by itself. In slices, between which others may be served."""
    calls = args.take("calls")
    args.done()
    if not isinstance(calls, list) or len(calls) > MAX_CALLS_A_STEP:
        raise BadRequest(f"step: calls must be a list of at most {MAX_CALLS_A_STEP} operations")
    results: list[Result] = []
    for done, call in enumerate(calls):
        if done and done % CALLS_A_SLICE == 0:
            yield
            cache.num_changes += 1
        try:
            if not isinstance(call, dict) or call.keys() != {"op", "args"}:
                raise BadRequest("step: an operation is a map with exactly op and args")
            operation = OPERATIONS.get(call["op"]) if isinstance(call["op"], str) else None
            if operation is None:
                raise BadRequest(f"step: no operation {brief(call['op'])}")
            arguments = Arguments(call["op"], call["args"], frames, args.room)
            result = operation(cache, session, arguments, now)
            if not isinstance(result, dict):
                result = yield from result
            results.append({"result": result})
        except KvdError as e:
            results.append({"error": error_to_wire(e)})
    return {"results": results}
