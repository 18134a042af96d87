"""`python -m tests.benchmarks.tree_memory PAGES DOCUMENT_PAGES`: how many bytes this process grows
by when a cache core of so many pages is built and filled with cached documents. Prints them."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from tests.benchmarks.workload import Garden


def resident_bytes() -> int:
    """Of this process, without what it shares with others or has mapped from files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: a Linux kernel from 4.5 on is needed")


def main() -> None:
    num_pages, document_pages = int(sys.argv[1]), int(sys.argv[2])
    # A small one first: what Python and numpy load once is not the tree's.
    Garden(1000).plant(1000 // document_pages, document_pages)
    gc.collect()
    before = resident_bytes()
    garden = Garden(num_pages)
    garden.plant(num_pages // document_pages, document_pages)
    gc.collect()
    print(resident_bytes() - before)


if __name__ == "__main__":
    main()
