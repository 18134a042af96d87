"""What a page costs the daemon beside its own bytes in the pool: metadata and tree."""

from __future__ import annotations

import subprocess
import sys

from kvd_shared.refs import TOKEN_BYTES
from tests.benchmarks.harness import Report, Row
from tests.benchmarks.workload import PAGE_SIZE
from tests.daemon import child_environment

POOL = 1_000_000  # pages
DOCUMENT_PAGES = (64, 8)  # 15.6k and 125k leaves
TARGET_BYTES, AIM_BYTES = 200, 120  # a page, beside its token ids


def memory(report: Report) -> None:
    """Rows: resident bytes a page of a full pool, token ids (4 bytes each) counted apart."""
    for document_pages in DOCUMENT_PAGES:
        report.say(f"memory of a pool of {POOL:,} pages in documents of {document_pages}")
        grown = _grown_bytes(document_pages)
        token_bytes = PAGE_SIZE * TOKEN_BYTES
        value = grown / POOL - token_bytes
        report.add(
            Row(
                name=f"memory a page, documents of {document_pages} pages, without token ids",
                value=round(value, 1),
                unit="B",
                target=TARGET_BYTES,
                aim=AIM_BYTES,
                details={
                    "pages": POOL,
                    "tokens": POOL * PAGE_SIZE,
                    "baseline": "token ids",
                    "ratio": round(grown / POOL / token_bytes, 2),
                    "resident_bytes": grown,
                },
            )
        )


def _grown_bytes(document_pages: int) -> int:
    """Measured in a process of its own, whose heap is new."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.tree_memory", str(POOL), str(document_pages)],
        env=child_environment(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(done.stdout)
