"""All that an operation of the cache core can change, as plain values."""

from __future__ import annotations

from typing import Any

from kvd.cache import CacheManager
from kvd.node import Node


def snapshot(core: CacheManager) -> dict[str, Any]:
    """All that an operation can change, as plain values."""
    tree, queue, free = core.tree, core.queue, core.free_list
    return {
        "tree": [node_values(node) if node else None for node in tree.nodes_by_slot],
        "roots": [
            (name, [n.id for n in r.top.children.values()]) for name, r in tree.roots.items()
        ],
        "order": [
            (priority, [n.id for n in policy])
            for tenant in tree.eviction.tenants
            for priority, policy in tenant.levels.items()
        ],
        "counts": (tree.num_pages, tree.num_evictable, tree.num_held, tree.num_holds),
        "places": (tree._slots.tobytes(), tree._free_slots[:], len(tree._timers)),
        "free": (free._stack.tobytes(), free._current.tobytes()),
        "sessions": [
            (
                (s.id, s.ended, dict(s.writing), dict(s.leased), dict(s.sealed)),
                ([n.id for n in s.nodes], s.num_requests, list(s.sequences)),
                [
                    (
                        (bytes(q.tail), q.num_tokens, q.num_computed, q.num_published, q.used),
                        (q.refs.tobytes(), q.spare.tobytes(), q.publishes),
                    )
                    for q in s.sequences.values()
                ],
            )
            for s in core.sessions.values()
        ],
        "sealed": dict(core.sealed),
        "parts": (
            [(k, t.refs, t.expires_s) for k, t in core.handover._tickets.items()],
            dict(core.operator.retained),
            (core.versions.minimum, dict(core.versions.minimums)),
        ),
        "queue": (
            queue._next,
            [(r.number, r.running, r.demand, r.asked, r.overdue) for r in queue._requests.values()],
        ),
        "announced": [
            (a.request.number, a.namespace, a.tokens, a.done_pages, a.progress_s, list(a.waiters))
            for a in core.announcements
        ],
        "notices": [(kind, request.number, tokens) for kind, request, tokens in core.notices],
        "counters": str(core.counters),
        "departures": dict(tree.departures.pages),
    }


def node_values(n: Node) -> tuple[Any, ...]:
    return (
        (n.id, n.namespace, bytes(n.tokens), bytes(n.refs), n.depth, n.protected_children),
        [(session.id, count) for session, count in n.holders.items()],
        [child.id for child in n.children.values()],
        (n.hits, n.publisher, n.born_s, n.last_use_s, n.expires_s, n.timer_s),
        (n.retention, n.priority, n.priority_until_s, n.order is not None),
    )
