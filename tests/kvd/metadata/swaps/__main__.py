"""Swaps each pair of harmless.toml in a copy of the sources and sees that no test fails.

Exit status 1: one does, so the order matters: move the pair to tests/mutants/metadata.toml.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.kvd.metadata.swaps.harmless import load
from tests.mutants.run import copy_sources, run_tests

HERE = "tests/kvd/metadata"
TESTS = (
    f"{HERE}/test_tables.py",
    f"{HERE}/test_resume.py",
    f"{HERE}/test_failpoints.py",
    f"{HERE}/test_restart.py::test_exactly_what_could_be_matched_comes_back[0]",
    f"{HERE}/test_restart.py::test_a_crash_at_any_store_leaves_the_truth_or_a_miss[0]",
    f"{HERE}/test_restart.py::test_a_crash_at_any_store_leaves_the_truth_or_a_miss[1]",
)


def main() -> int:
    matters = 0
    with tempfile.TemporaryDirectory(prefix="kvd-swaps-") as folder:
        tree = copy_sources(Path(folder))
        for swap in load():
            path = tree / swap.file
            good = path.read_text()
            path.write_text(good.replace(swap.old, swap.new))
            failed = run_tests(tree, TESTS)
            path.write_text(good)
            matters += failed
            print(f"{'MATTERS' if failed else 'harmless':9} {swap.file:28} {swap.reason}")
    return 1 if matters else 0


if __name__ == "__main__":
    sys.exit(main())
