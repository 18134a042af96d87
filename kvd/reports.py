"""What an admin may ask. Reads change nothing; what would take longer than a turn is sliced."""

from __future__ import annotations

from collections.abc import Callable

from kvd.arguments import Arguments
from kvd.audit import audit as audit_cache
from kvd.daemon import Attachment, Daemon
from kvd.explain import explain as explain_match
from kvd.page_map import page_counts, page_states, state_of
from kvd.report_parts import Result, Sliced, named_pool, space_to_wire
from kvd.status_report import status
from kvd.tree_report import tree
from kvd_shared.errors import BadRequest
from kvd_shared.refs import REF_BYTES, generation_of

MAX_REQUESTS = 1000  # shown of one session
RETAINED_A_SLICE = 200


def pages(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    pool = named_pool(daemon, args)
    args.done()
    counts = yield from page_counts(pool.cache)
    states = yield from page_states(pool.cache)
    return {
        "pool": pool.name,
        "num_pages": pool.cache.num_pages,
        "counts": counts,
        "map": states.tobytes(),
    }


def sessions(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    args.done()
    found = []
    for attachment in list(daemon.attachments.values()):
        found.append(_session(attachment, now))
        yield
    return {"sessions": found}


def audit(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    pool = named_pool(daemon, args)
    args.done()
    found = yield from audit_cache(pool.cache)
    return {"pool": pool.name, **found}


def explain(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    pool = named_pool(daemon, args)
    cache, namespace = pool.cache, args.namespace()
    tokens = args.tokens(cache.vocab_size, cache.options.limits.max_prompt_tokens)
    args.done()
    if not tokens:
        raise BadRequest("explain: no tokens: a prompt has at least one")
    found = yield from explain_match(cache, namespace, tokens, now)
    return {"pool": pool.name, **found}


def who_holds(daemon: Daemon, args: Arguments, now: float) -> Result:
    pool, page = named_pool(daemon, args), args.number("page")
    args.done()
    cache = pool.cache
    if not 0 <= page < cache.num_pages:
        raise BadRequest(f"who_holds: page {page}: the pool has pages 0 to {cache.num_pages - 1}")
    ref = cache.free_list.current(page)
    node = cache.tree.node_of(ref)
    holders = []
    for session in cache.sessions.values():
        own = session.own(ref)
        count = node.holders.get(session, 0) if node else own[ref] if own else 0
        if count:
            holders.append({"session": session.id, "name": session.name, "holds": count})
    return {
        "pool": pool.name,
        "page": page,
        "generation": generation_of(ref),
        "state": state_of(cache, ref).name.lower(),
        "holders": holders,
        "position": cache.tree.depth_of(page) if node else None,
    }


def retained(daemon: Daemon, args: Arguments, now: float) -> Sliced:
    """What operators keep. `matchable`: it has not been flushed since."""
    pool = named_pool(daemon, args)
    args.done()
    cache, found = pool.cache, []
    for number, one in list(cache.operator.retained.items()):
        num_pages = len(one.refs) // REF_BYTES
        node = cache.tree.node_of(int.from_bytes(one.refs[:REF_BYTES], "little"))
        entry = {
            "number": number,
            "pages": num_pages,
            "tokens": num_pages * cache.page_size,
            "expires_s": None if one.expires_s is None else one.expires_s - now,
            "matchable": node is not None and node.root.live,
        }
        found.append(entry | space_to_wire(one.namespace))
        if len(found) % RETAINED_A_SLICE == 0:
            yield
    return {
        "pool": pool.name,
        "num_pages": cache.operator.num_pages,
        "quota": cache.operator.quota,
        "retained": found,
    }


def _session(attachment: Attachment, now: float) -> Result:
    pool, session = attachment.pool, attachment.session
    requests = pool.cache.queue.of_session(session) if pool and session else []
    running = sum(request.running for request in requests)
    return {
        "id": attachment.id,
        "name": attachment.name,
        "role": attachment.role,
        "pid": attachment.process.pid,
        "uid": attachment.process.uid,
        "pool": pool.name if pool else None,
        "age_s": now - attachment.attached_s,
        "state": "quarantined" if attachment.ended else "live",
        "ended_s_ago": None if attachment.ended_s is None else now - attachment.ended_s,
        "process": "living" if attachment.dead_s is None else "dead",
        "held_pages": attachment.num_held_pages,
        "writing_pages": len(session.writing) if session else 0,
        "leased_pages": len(session.leased) if session else 0,
        "sequences": len(session.sequences) if session else 0,
        "running_requests": running,
        "waiting_requests": len(requests) - running,
        "requests": [{"number": r.number, "running": r.running} for r in requests[:MAX_REQUESTS]],
    }


REPORTS: dict[str, Callable[[Daemon, Arguments, float], Result | Sliced]] = {
    f.__name__: f for f in (status, pages, tree, sessions, audit, explain, who_holds, retained)
}
