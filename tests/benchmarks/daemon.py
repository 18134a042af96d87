"""`make bench-daemon`: the cache core in process and over ZeroMQ, against its budgets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from tests.benchmarks.daemon_chat import chats
from tests.benchmarks.daemon_eviction import evictions
from tests.benchmarks.daemon_match import matches
from tests.benchmarks.daemon_memory import memory
from tests.benchmarks.daemon_rpc import rpcs
from tests.benchmarks.daemon_tree import fan_outs, sizes
from tests.benchmarks.daemon_turns import turns
from tests.benchmarks.harness import Report

PARTS: dict[str, Callable[[Report], None]] = {
    "match": matches,
    "sizes": sizes,
    "fan-outs": fan_outs,
    "evict": evictions,
    "chat": chats,
    "rpc": rpcs,
    "turns": turns,
    "memory": memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.daemon", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    chosen = parser.parse_args().parts or list(PARTS)
    for name in chosen:
        if name not in PARTS:
            parser.error(f"no part {name!r}: must be one of {', '.join(PARTS)}")
    report = Report("daemon", {"page_size": 16, "parts": chosen}, ["pyzmq", "msgpack", "numpy"])
    for name in chosen:
        PARTS[name](report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
