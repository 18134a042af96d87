"""`kvdctl status`: the daemon and its pools on one page.

Message   {"op": "status", "args": {}}
Reply     {"version": "0.1.0", "pid": 812, "uptime_s": 5.2, "protocol": 1, "core": "compiled",
           "socket_dir": "/run/kvd", "draining": false, "num_sessions": 2,
           "quarantined_sessions": 0, "quarantine_alarms": 0, "refused": {"NO_PAGES": 3},
           "refused_access": {"wrong_role": 1}, "ignored_connections": 0,
           "ignored_messages": 0, "pools": [{...}]};
           docs/protocol.md has the fields of a pool
Command   kvdctl status [-o json]
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from kvd.admin.page_states import LEGENDS, name_of
from kvd.admin.style import Style, count, duration, key_values, percent, printable
from kvd.admin.verb import Reply, Verb, as_observer
from kvd_shared.page_state import PageState
from kvd_shared.sizes import format_bytes

BAR_WIDTH = 40
_SURVIVAL = {
    "systemd": "systemd: keeps the memory when the daemon crashes or is restarted",
    "keeper": "keeper: keeps the memory when the daemon crashes",
    "none": "none: the memory ends with the daemon",
}


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.status()


def render(reply: Reply, style: Style) -> str:
    draining = style.paint("  draining", "yellow") if reply["draining"] else ""
    head = style.paint(f"kvd {reply['version']}", "bold") + (
        f"  up {duration(reply['uptime_s'])}  pid {reply['pid']}  protocol {reply['protocol']}"
        f"  core {reply['core']}"
        f"  {count(reply['num_sessions'], 'session')}  {reply['socket_dir']}{draining}"
    )
    tail = [
        f"{what}: " + ", ".join(f"{why} {number:,}" for why, number in sorted(counts.items()))
        for what, counts in (
            ("refused requests", reply["refused"]),
            ("refused for who asked", reply["refused_access"]),
        )
        if counts
    ]
    if reply["quarantined_sessions"] or reply["quarantine_alarms"]:
        waiting = count(reply["quarantined_sessions"], "ended session")
        alarms = count(reply["quarantine_alarms"], "alarm")
        line = f"{waiting} quarantined, its process not proven dead; {alarms} since start"
        tail.append(style.paint(line, "yellow"))
    if reply["ignored_connections"]:
        ignored = count(reply["ignored_connections"], "connection")
        line = f"{ignored} not answered any more, for {count(reply['ignored_messages'], 'message')}"
        tail.append(style.paint(f"{line} that made no sense, since start", "yellow"))
    return "\n\n".join([head, *(_pool(pool, style) for pool in reply["pools"]), *tail])


def _pool(pool: Reply, style: Style) -> str:
    rows = [*_memory(pool, style), *_use(pool), *_history(pool), *_tenants(pool)]
    return f"{style.paint('pool ' + pool['name'], 'bold')} ({pool['device']})\n{key_values(rows)}"


def _memory(pool: Reply, style: Style) -> list[tuple[str, str]]:
    layout, total = pool["layout"], pool["num_pages"]
    return [
        (
            "layout",
            f"{layout['num_layers']} layers x {layout['num_kv_heads']} kv heads x "
            f"{layout['head_dim']}, {layout['dtype']}, page {layout['page_size']} tokens = "
            f"{format_bytes(pool['page_bytes'])}",
        ),
        ("model", pool["model"] or "any of this layout"),
        ("survival", _SURVIVAL[pool["survival"]]),
        ("pages", f"{total:,} ({format_bytes(total * pool['page_bytes'])})  {_bar(pool, style)}"),
        *(("", line) for line in _counts(pool)),
        ("retained", f"{pool['retained_pages']:,} of {count(pool['retain_quota'], 'page')}"),
    ]


def _use(pool: Reply) -> list[tuple[str, str]]:
    asked, matched = pool["tokens_asked"], pool["tokens_matched"]
    own, factor = pool["tokens_matched_own"], pool["sharing_factor"]
    wasted, slots = pool["wasted_slots"], pool["sequence_slots"]
    return [
        ("hits", f"{matched:,} of {asked:,} tokens asked for ({percent(matched, asked)})"),
        (
            "",
            f"{own:,} its own · {matched - own:,} of other workers · "
            f"{pool['tokens_partial']:,} more in partial pages",
        ),
        ("sharing", "–" if factor is None else f"{factor:.2f} holds a held page"),
        (
            "waste",
            f"{wasted:,} of {slots:,} slots of {count(pool['sequences'], 'sequence')} "
            f"({percent(wasted, slots)})",
        ),
        (
            "requests",
            f"{pool['running_requests']:,} running, {pool['waiting_requests']:,} waiting, "
            f"{pool['announced_requests']:,} announced; {pool['requests_waited']:,} have waited "
            "for another's prefix",
        ),
        ("namespaces", f"{pool['namespaces']:,}"),
    ]


def _history(pool: Reply) -> list[tuple[str, str]]:
    left = [f"{number:,} {why.replace('_', ' ')}" for why, number in pool["left_pages"].items()]
    return [
        (
            "since start",
            f"{pool['allocated_pages']:,} pages allocated, {pool['published_pages']:,} published, "
            f"{pool['duplicate_pages']:,} duplicates, {pool['copied_pages']:,} copied",
        ),
        ("left", f"{' · '.join(left)} (policy {pool['policy']})"),
        (
            "lived",
            f"median {_median(pool['lifetime_s'])}, unused at last {_median(pool['idle_s'])}",
        ),
    ]


def _tenants(pool: Reply) -> list[tuple[str, str]]:
    """Only where there is more than the one of everybody."""
    lines = [
        f"{printable(tenant['name'])} {tenant['num_pages']:,} pages "
        f"({tenant['min_pages']:,} to {tenant['max_pages']:,})"
        for tenant in pool["tenants"]
    ]
    if len(lines) < 2:
        return []
    return [("" if number else "tenants", line) for number, line in enumerate(lines)]


def _median(histogram: Reply) -> str:
    """The bucket that has it."""
    bounds, counts = histogram["bounds"], histogram["counts"]
    seen, half = 0, sum(counts) / 2
    for number, pages in enumerate(counts):
        seen += pages
        if pages and seen >= half:
            if number == len(bounds):
                return f"over {duration(bounds[-1])}"
            return f"{duration(bounds[number - 1] if number else 0)} to {duration(bounds[number])}"
    return "–"


def _shown_counts(pool: Reply) -> dict[PageState, int]:
    """Pages by state. The daemon's `active` has the shared and the detached ones, too; pages that
    are both, or shared with sessions that are over, make these three a little inexact."""
    counts = {state: pool["counts"].get(name_of(state), 0) for state in PageState}
    active = pool["counts"]["active"]
    counts[PageState.DETACHED] = min(pool["detached_pages"], active)
    active -= counts[PageState.DETACHED]
    counts[PageState.SHARED] = min(pool["shared_pages"], active)
    counts[PageState.ACTIVE] = active - counts[PageState.SHARED]
    return counts


def _counts(pool: Reply) -> list[str]:
    counts = _shown_counts(pool)
    parts = [
        f"{name_of(state)} {counts[state]:,} ({percent(counts[state], pool['num_pages'])})"
        for state in LEGENDS
    ]
    return [" · ".join(parts[at : at + 4]) for at in range(0, len(parts), 4)]


def _bar(pool: Reply, style: Style) -> str:
    """Free pages last. A state that has pages has at least one character."""
    counts, total = _shown_counts(pool), pool["num_pages"]
    bar, used = "", 0
    for state, legend in LEGENDS.items():
        if state is PageState.FREE:
            continue
        cells = min(-(-counts[state] * BAR_WIDTH // total), BAR_WIDTH - used)
        bar += style.paint(legend.mark * cells, legend.color)
        used += cells
    free = LEGENDS[PageState.FREE]
    return bar + style.paint(free.mark * (BAR_WIDTH - used), free.color)


VERB = Verb(
    help="the daemon and its pools on one page",
    call=call,
    page=lambda reply, style, args: render(reply, style),
    role=as_observer,
)
