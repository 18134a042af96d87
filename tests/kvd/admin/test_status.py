import re
from typing import Any

from kvd.admin.status import render
from kvd.admin.style import Style

REPLY: dict[str, Any] = {
    "version": "0.1.0",
    "pid": 812,
    "uptime_s": 3 * 86400 + 4 * 3600 + 5,
    "protocol": 1,
    "socket_dir": "/run/kvd",
    "draining": False,
    "num_sessions": 3,
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
            "page_bytes": 9 << 18,
            "num_pages": 1000,
            "counts": {
                "free": 499,
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
            "evicted_pages": 7,
            "published_pages": 1234,
            "duplicate_pages": 3,
            "waiting_requests": 4,
            "running_requests": 5,
        }
    ],
}

PAGE = """\
kvd 0.1.0  up 3d 4h  pid 812  protocol 1  3 sessions  /run/kvd

pool Qwen3-8B (cpu)
  layout       36 layers x 8 kv heads x 128, bfloat16, page 16 tokens = 2.25 MiB
  model        9c1e77aa01bc23de
  pages        1,000 (2.2 GiB)  w▓▓▓▓▓▓▓▓████▒▒▒▒▒▒▒▒░░░░░░░░░░░░░░░░░░░
               free 499 (49.9 %) · writing 1 (0.1 %) · active 200 (20.0 %) · shared 100 (10.0 %)
               cached 200 (20.0 %) · duplicate 0 (0.0 %) · quarantined 0 (0.0 %)
  hits         12,345 of 20,000 tokens asked for (61.7 %)
  since start  1,234 pages published, 3 duplicates, 7 evicted
  requests     5 running, 4 waiting
  namespaces   2"""


def test_one_page_shows_it_all() -> None:
    assert render(REPLY, Style()) == PAGE


def test_colours_change_nothing_else() -> None:
    coloured = render(REPLY, Style(color=True))
    assert coloured != PAGE
    assert re.sub("\x1b\\[[0-9]+m", "", coloured) == PAGE


def test_a_fresh_pool_divides_nothing_by_zero() -> None:
    pool = REPLY["pools"][0] | {"tokens_asked": 0, "tokens_matched": 0, "model": None}
    page = render(REPLY | {"pools": [pool], "draining": True, "num_sessions": 1}, Style())
    assert "0 of 0 tokens asked for (–)" in page
    assert "any of this layout" in page
    assert "1 session  /run/kvd  draining" in page


def test_a_full_bar_stays_a_bar() -> None:
    """Every state has at least one character, and together they do not grow the bar."""
    counts = {"free": 0, "writing": 1, "active": 996, "cached": 1, "duplicate": 1, "quarantined": 1}
    pool = REPLY["pools"][0] | {"counts": counts, "shared_pages": 1}
    line = next(x for x in render(REPLY | {"pools": [pool]}, Style()).splitlines() if "GiB" in x)
    bar = line.split("  ")[-1]
    assert len(bar) == 40
