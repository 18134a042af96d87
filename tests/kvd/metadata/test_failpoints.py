"""Failpoints: every one is known, armed only by name, and ends the process where it says."""

from __future__ import annotations

import mmap
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import kvd.metadata.failpoints as module
from kvd.cache import CacheManager
from kvd.metadata import Geometry, create_metadata, open_metadata
from kvd.metadata.failpoints import NAMES, Failpoints, UnknownFailpoint
from kvd.recovery import recover
from kvd_shared.namespace import Namespace
from tests.kvd.tokens import page_tokens

KVD = Path(module.__file__).parents[1]
GEOMETRY = Geometry(num_pages=8, page_size=8, num_roots=4, num_sessions=4, num_weights=4)
M = Namespace(model="m")


def test_the_list_names_exactly_the_places_in_the_sources() -> None:
    found = [
        name
        for path in KVD.rglob("*.py")
        for name in re.findall(r'FAILPOINTS\.hit\(\s*"([^"]+)"', path.read_text())
    ]
    assert set(found) == set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


def test_each_place_costs_a_look_at_one_attribute() -> None:
    for path in KVD.rglob("*.py"):
        lines = path.read_text().splitlines()
        for before, line in pairwise(lines):
            if "FAILPOINTS.hit(" in line:
                assert before.strip() == "if FAILPOINTS.armed:", f"{path}: {line}"


@pytest.mark.parametrize("wanted", ["nonsense", "taken.done:0", "taken.done:x", "taken.done:-1"])
def test_a_failpoint_that_cannot_be_is_refused(wanted: str) -> None:
    with pytest.raises(UnknownFailpoint):
        Failpoints().arm_from({module.VARIABLE: wanted})


def test_the_nth_pass_and_no_other() -> None:
    points, seen = Failpoints(), list[str]()
    points.arm("taken.done", 2, seen.append)
    for name in ("taken.done", "freed.done", "taken.before_owner"):
        points.hit(name)
    assert not seen
    points.hit("taken.done")
    assert seen == ["taken.done"]


DIES = """
import mmap, os, sys
from kvd.cache import CacheManager
from kvd.metadata import Geometry, Metadata, ProcessEntry, open_metadata
from kvd_shared.namespace import Namespace
geometry = Geometry(num_pages=8, page_size=8, num_roots=4, num_sessions=4, num_weights=4)
meta = open_metadata(int(sys.argv[1]), geometry)
cache = CacheManager(8, 8, meta=meta)
who = ProcessEntry(
    token_digest=bytes(32), pid=1, start_time=1, uid=0, gid=0, name="w", role="worker"
)
session = cache.open_session(1, "w", 0.0, who)
refs = cache.allocate(session, 2, None, 0.0)
tokens = b"".join(bytes([n, 0, 0, 0]) * 8 for n in (97, 98))
cache.publish(session, Namespace(model="m"), tokens, refs, None, 0.0)
cache.free(session, refs, 0.0)
cache.flush(list(cache.tree.roots.values()))
cache.release_session(session)
while cache.sweep(0.0):
    pass
print("lived")
"""


@pytest.mark.parametrize(
    ("name", "matchable"),
    [
        ("start.before_epoch", 0),
        ("publish.before_owner", 0),
        ("publish.done", 2),
        ("root_dead.before_seal", 2),
        ("root_dead.done", 0),
        ("freed.before_owner", 0),
        ("session_gone.done", 0),
    ],
)
def test_a_process_is_killed_there_and_its_memory_says_how_far_it_came(
    name: str, matchable: int
) -> None:
    meta = create_metadata(GEOMETRY, "0123456789abcdef")
    os.set_inheritable(meta.fd, True)
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(meta.fd)],
        env=os.environ | {module.VARIABLE: name},
        pass_fds=[meta.fd],
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    again = open_metadata(os.dup(meta.fd), GEOMETRY)
    cache = CacheManager(8, 8, meta=again)
    assert recover(cache, 1.0).report.matchable == matchable
    walk = cache.tree.walk(M, page_tokens("ab"), 2, 1.0)
    assert walk.num_pages == matchable
    assert again.header.epoch == (2 if name == "start.before_epoch" else 3)
    assert again.header.failed_warm_starts == 2  # none of them came to READY
    meta.close()
    again.close()
    assert again.sessions_region[1] >= mmap.PAGESIZE
