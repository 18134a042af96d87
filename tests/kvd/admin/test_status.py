import re
from typing import Any

from kvd.admin.status import render
from kvd.admin.style import Style

REPLY: dict[str, Any] = {
    "version": "0.1.0",
    "pid": 812,
    "uptime_s": 3 * 86400 + 4 * 3600 + 5,
    "protocol": 1,
    "core": "compiled",
    "socket_dir": "/run/kvd",
    "draining": False,
    "num_sessions": 3,
    "refused": {"NO_PAGES": 1200, "BAD_REQUEST": 1},
    "refused_access": {},
    "ignored_connections": 0,
    "ignored_messages": 0,
    "quarantined_sessions": 0,
    "quarantine_alarms": 0,
    "pools": [
        {
            "name": "Qwen3-8B",
            "device": "cpu",
            "layout": {
                "num_layers": 36,
                "num_kv_heads": 8,
                "head_dim": 128,
                "page_size": 16,
                "dtype": "bfloat16",
            },
            "model": "9c1e77aa01bc23de",
            "survival": "keeper",
            "page_bytes": 9 << 18,
            "num_pages": 1000,
            "counts": {
                "free": 497,
                "leased": 2,
                "writing": 1,
                "active": 300,
                "cached": 200,
                "duplicate": 0,
                "quarantined": 0,
            },
            "shared_pages": 100,
            "namespaces": 2,
            "tokens_asked": 20000,
            "tokens_matched": 12345,
            "tokens_matched_own": 2345,
            "tokens_partial": 67,
            "published_pages": 1234,
            "duplicate_pages": 3,
            "copied_pages": 8,
            "allocated_pages": 2000,
            "waiting_requests": 4,
            "running_requests": 5,
            "announced_requests": 1,
            "requests_waited": 9,
            "detached_pages": 50,
            "retained_pages": 26,
            "retain_quota": 250,
            "sharing_factor": 1.334,
            "sequences": 6,
            "sequence_slots": 4800,
            "wasted_slots": 120,
            "left_pages": {"evicted": 7, "over_share": 1, "expired": 0},
            "lifetime_s": {"bounds": [1.0, 3.0, 10.0], "counts": [1, 2, 5, 0], "sum": 40.0},
            "idle_s": {"bounds": [1.0, 3.0, 10.0], "counts": [0, 0, 0, 8], "sum": 400.0},
            "policy": "lru",
            "tenants": [
                {"name": "others", "num_pages": 400, "min_pages": 0, "max_pages": 1000},
                {"name": "a\x1bb", "num_pages": 100, "min_pages": 50, "max_pages": 500},
            ],
        }
    ],
}

PAGE = """\
kvd 0.1.0  up 3d 4h  pid 812  protocol 1  core compiled  3 sessions  /run/kvd

pool Qwen3-8B (cpu)
  layout       36 layers x 8 kv heads x 128, bfloat16, page 16 tokens = 2.25 MiB
  model        9c1e77aa01bc23de
  survival     keeper: keeps the memory when the daemon crashes
  pages        1,000 (2.2 GiB)  lw▓▓▓▓▓▓████▒▒▒▒▒▒▒▒xx░░░░░░░░░░░░░░░░░░
               free 497 (49.7 %) · leased 2 (0.2 %) · writing 1 (0.1 %) · active 150 (15.0 %)
               shared 100 (10.0 %) · cached 200 (20.0 %) · detached 50 (5.0 %) · duplicate 0 (0.0 %)
               quarantined 0 (0.0 %)
  retained     26 of 250 pages
  hits         12,345 of 20,000 tokens asked for (61.7 %)
               2,345 its own · 10,000 of other workers · 67 more in partial pages
  sharing      1.33 holds a held page
  waste        120 of 4,800 slots of 6 sequences (2.5 %)
  requests     5 running, 4 waiting, 1 announced; 9 have waited for another's prefix
  namespaces   2
  since start  2,000 pages allocated, 1,234 published, 3 duplicates, 8 copied
  left         7 evicted · 1 over share · 0 expired (policy lru)
  lived        median 3.0s to 10s, unused at last over 10s
  tenants      others 400 pages (0 to 1,000)
               a?b 100 pages (50 to 500)

refused requests: BAD_REQUEST 1, NO_PAGES 1,200"""


def test_one_page_shows_it_all() -> None:
    assert render(REPLY, Style()) == PAGE


def test_colours_change_nothing_else() -> None:
    coloured = render(REPLY, Style(color=True))
    assert coloured != PAGE
    assert re.sub("\x1b\\[[0-9]+m", "", coloured) == PAGE


def test_a_fresh_pool_divides_nothing_by_zero() -> None:
    nothing = {"bounds": [1.0], "counts": [0, 0], "sum": 0.0}
    zeros = dict.fromkeys(["tokens_asked", "tokens_matched", "sequence_slots", "wasted_slots"], 0)
    fresh = {"model": None, "sharing_factor": None, "lifetime_s": nothing, "idle_s": nothing}
    pool = REPLY["pools"][0] | zeros | fresh
    page = render(REPLY | {"pools": [pool], "draining": True, "num_sessions": 1}, Style())
    assert "0 of 0 tokens asked for (–)" in page
    assert "any of this layout" in page
    assert "median –, unused at last –" in page
    assert "0 of 0 slots" in page
    assert "1 session  /run/kvd  draining" in page


def test_a_full_bar_stays_a_bar() -> None:
    """Every state has at least one character, and together they do not grow the bar."""
    counts = dict.fromkeys(["leased", "writing", "cached", "duplicate", "quarantined"], 1)
    counts |= {"free": 0, "active": 995}
    pool = REPLY["pools"][0] | {"counts": counts, "shared_pages": 1, "detached_pages": 1}
    line = next(x for x in render(REPLY | {"pools": [pool]}, Style()).splitlines() if "GiB" in x)
    bar = line.split("  ")[-1]
    assert len(bar) == 40


def test_one_tenant_is_everybody_and_no_refusal_is_not_told() -> None:
    pool = REPLY["pools"][0] | {"tenants": REPLY["pools"][0]["tenants"][:1]}
    page = render(REPLY | {"pools": [pool], "refused": {}}, Style())
    assert "tenants" not in page and "refused" not in page
