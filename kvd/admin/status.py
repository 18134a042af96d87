"""`kvdctl status`: the daemon and its pools on one page.

Message   {"op": "status", "args": {}}
Reply     {"version": "0.1.0", "pid": 812, "uptime_s": 5.2, "protocol": 1, "socket_dir": "/run/kvd",
           "draining": false, "num_sessions": 2, "pools": [{"name": "default", "device": "cpu",
           "layout": {...}, "model": "9c1e…" or nil, "page_bytes": 32768, "num_pages": 4096,
           "counts": {"free": 4000, "writing": 0, "active": 90, "cached": 6, "duplicate": 0,
           "quarantined": 0}, "shared_pages": 40, "namespaces": 1, "tokens_asked": 4096,
           "tokens_matched": 2048, "evicted_pages": 0, "published_pages": 96,
           "duplicate_pages": 0, "waiting_requests": 0, "running_requests": 2}]}
Command   kvdctl status [-o json]
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from kvd.admin.page_states import PAGE_STATES
from kvd.admin.style import Style, count, duration, key_values, percent
from kvd.admin.verb import Reply, Verb
from kvd_shared.sizes import format_bytes

BAR_WIDTH = 40


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.status()


def render(reply: Reply, style: Style) -> str:
    draining = style.paint("  draining", "yellow") if reply["draining"] else ""
    head = style.paint(f"kvd {reply['version']}", "bold") + (
        f"  up {duration(reply['uptime_s'])}  pid {reply['pid']}  protocol {reply['protocol']}"
        f"  {count(reply['num_sessions'], 'session')}  {reply['socket_dir']}{draining}"
    )
    return "\n\n".join([head, *(_pool(pool, style) for pool in reply["pools"])])


def _pool(pool: Reply, style: Style) -> str:
    layout = pool["layout"]
    total = pool["num_pages"]
    rows = [
        (
            "layout",
            f"{layout['num_layers']} layers x {layout['num_kv_heads']} kv heads x "
            f"{layout['head_dim']}, {layout['dtype']}, page {layout['page_size']} tokens = "
            f"{format_bytes(pool['page_bytes'])}",
        ),
        ("model", pool["model"] or "any of this layout"),
        ("pages", f"{total:,} ({format_bytes(total * pool['page_bytes'])})  {_bar(pool, style)}"),
        *(("", line) for line in _counts(pool)),
        (
            "hits",
            f"{pool['tokens_matched']:,} of {pool['tokens_asked']:,} tokens asked for "
            f"({percent(pool['tokens_matched'], pool['tokens_asked'])})",
        ),
        (
            "since start",
            f"{pool['published_pages']:,} pages published, {pool['duplicate_pages']:,} duplicates, "
            f"{pool['evicted_pages']:,} evicted",
        ),
        (
            "requests",
            f"{pool['running_requests']:,} running, {pool['waiting_requests']:,} waiting",
        ),
        ("namespaces", f"{pool['namespaces']:,}"),
    ]
    return f"{style.paint('pool ' + pool['name'], 'bold')} ({pool['device']})\n{key_values(rows)}"


def _shown_counts(pool: Reply) -> dict[str, int]:
    """Pages by the states of PAGE_STATES: the daemon counts shared pages as active ones, too."""
    shared: int = pool["shared_pages"]
    return pool["counts"] | {"shared": shared, "active": pool["counts"]["active"] - shared}


def _counts(pool: Reply) -> list[str]:
    counts = _shown_counts(pool)
    parts = [
        f"{state.name} {counts[state.name]:,} ({percent(counts[state.name], pool['num_pages'])})"
        for state in PAGE_STATES
    ]
    return [" · ".join(parts[:4]), " · ".join(parts[4:])]


def _bar(pool: Reply, style: Style) -> str:
    """Free pages last. A state that has pages has at least one character."""
    counts, total = _shown_counts(pool), pool["num_pages"]
    bar, used = "", 0
    for state in PAGE_STATES[1:]:
        cells = -(-counts[state.name] * BAR_WIDTH // total)
        cells = min(cells, BAR_WIDTH - used)
        bar += style.paint(state.mark * cells, state.color)
        used += cells
    return bar + style.paint(PAGE_STATES[0].mark * (BAR_WIDTH - used), PAGE_STATES[0].color)


VERB = Verb(
    help="the daemon and its pools on one page",
    call=call,
    page=lambda reply, style, args: render(reply, style),
)
