"""What outlives the daemon: whose every page is, and what of it may be matched.

One memory, one writer (the daemon), every store in an order in which a crash at any moment leaves
either the truth or a miss:

    header  sessions  current  owner  weights  roots  rows
    │       │         │        │      │        │      └ records.py      what a page holds
    │       │         │        │      │        └ roots.py               namespaces with a tree
    │       │         │        │      └ weights.py                      lowest valid versions
    │       │         └────────┴ page_states.py                         valid reference and owner
    │       └ sessions.py                                               attached processes
    └ header.py                                                         which pool, which epoch

Native byte order (little-endian): it never leaves the machine, nor the boot.
"""

from __future__ import annotations

from kvd.metadata.cold import ColdStart
from kvd.metadata.geometry import Geometry, metadata_bytes
from kvd.metadata.memory import Metadata, create_metadata, open_metadata
from kvd.metadata.sessions import ENDED, FENCED, LIVE, ProcessEntry, SessionEntry

__all__ = [
    "ENDED",
    "FENCED",
    "LIVE",
    "ColdStart",
    "Geometry",
    "Metadata",
    "ProcessEntry",
    "SessionEntry",
    "create_metadata",
    "metadata_bytes",
    "open_metadata",
]
