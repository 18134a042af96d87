"""The daemon is killed while a client holds pages; what the next one makes of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import BadRequest, DaemonUnreachable, PoolLost, SessionEnded
from kvd_shared.namespace import Namespace
from kvd_shared.refs import PageRefs, page_ids, page_of
from tests.daemon import RunningDaemon, eventually, running_daemon

SPACE = Namespace(model="m")
PAGE = 16
PROMPT = np.arange(4 * PAGE)
GRACE = "resume_grace_s = 0.6\n"


@contextmanager
def kept_daemon(tmp_path: Path, **options: Any) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, max_restarts=50, **options) as daemon:
        yield daemon


def crash(daemon: RunningDaemon) -> None:
    """SIGKILL, and wait for the next one."""
    starts = len(daemon.logs("daemon.ready"))
    os.kill(daemon.pid, signal.SIGKILL)
    eventually(lambda: len(daemon.logs("daemon.ready")) > starts, 20.0)


def resumed(client: KvdClient, held: dict[int, int]) -> list[int]:
    """As an engine does it: until the daemon is there. Returns what was refused."""

    def once() -> tuple[PageRefs] | None:
        try:
            return (client.resume(list(held), list(held.values())),)
        except DaemonUnreachable:
            return None

    [refused] = eventually(once, 20.0)
    found: list[int] = refused.tolist()
    return found


def held_by(daemon: RunningDaemon, refs: PageRefs) -> list[Any]:
    """State and holders of each page, as the daemon sees them."""
    found = []
    for page in page_ids(refs).tolist():
        one = daemon.ask(verbs.who_holds(page))
        holders = [(h["session"], h["holds"]) for h in one["holders"] if h["session"] > 0]
        found.append((one["generation"], one["state"], sorted(holders)))
    return found


def test_all_is_as_before_a_crash(tmp_path: Path) -> None:
    """Pages of the tree held once and twice, an own one held twice, a sealed tail, and another
    session's pages: who holds what is the same, the bytes are, and the cache is warm."""
    with (
        kept_daemon(tmp_path) as daemon,
        daemon.attach("one") as one,
        daemon.attach("other") as other,
    ):
        refs = one.call(verbs.acquire(SPACE, PROMPT, 6)).refs
        assert one.pool is not None and one.mapping is not None
        bytes_ = np.frombuffer(one.mapping.write_view(), np.uint8).reshape(one.pool.num_pages, -1)
        bytes_[page_ids(refs)] = np.arange(1, 7, dtype=np.uint8)[:, None]
        one.call(verbs.publish(SPACE, PROMPT, refs[:4]))
        one.call(verbs.share(refs[:1]))
        one.call(verbs.share(refs[4:5]))
        one.call(verbs.seal_tail(int(refs[5]), 3))
        theirs = other.call(verbs.match(SPACE, PROMPT)).refs
        private = other.call(verbs.allocate(2))
        everything = np.concatenate([refs, private])
        before, counts = held_by(daemon, everything), daemon.counts()
        session, epoch = one.session, one.epoch

        crash(daemon)
        assert not one.alive and not one.fenced
        held = dict.fromkeys(refs.tolist(), 1) | {int(refs[0]): 2, int(refs[4]): 2}
        assert resumed(one, held) == []
        assert resumed(other, dict.fromkeys([*theirs.tolist(), *private.tolist()], 1)) == []
        assert (one.session, one.epoch) == (session, epoch + 1)
        assert one.alive and not one.fenced
        eventually(lambda: daemon.counts() == counts)
        assert held_by(daemon, everything) == before
        assert (bytes_[page_ids(refs), 0] == np.arange(1, 7)).all()

        found = one.call(verbs.match(SPACE, [*PROMPT, 1]))
        assert found.refs.tolist() == refs[:4].tolist()
        one.call(verbs.free(found.refs))
        for ref in refs.tolist():
            for _ in range(held[ref]):
                one.call(verbs.free([ref]))
        other.call(verbs.free(theirs))
        other.call(verbs.free(private))
        assert daemon.counts() | {"cached": 4, "free": 60} == daemon.counts()
        daemon.check()


def test_what_is_not_declared_goes_free_and_what_is_anothers_is_refused(tmp_path: Path) -> None:
    with (
        kept_daemon(tmp_path) as daemon,
        daemon.attach("one") as one,
        daemon.attach("other") as other,
    ):
        mine, theirs = one.call(verbs.allocate(8)), other.call(verbs.allocate(2))
        freed = one.call(verbs.allocate(1))
        one.call(verbs.free(freed))
        crash(daemon)
        strange = [int(theirs[0]), int(freed[0]), int(mine[0]) + (1 << 32)]
        held = dict.fromkeys([*mine[1:4].tolist(), *strange], 1)
        assert sorted(resumed(one, held)) == sorted(strange)
        assert resumed(other, dict.fromkeys(theirs.tolist(), 1)) == []
        eventually(lambda: daemon.counts()["writing"] == 5)
        assert daemon.counts()["free"] == 59
        one.call(verbs.free(mine[1:4]))
        daemon.check()


def test_a_large_declaration_comes_in_parts(tmp_path: Path) -> None:
    with (
        kept_daemon(tmp_path, num_pages=12_000, head_dim=1) as daemon,
        daemon.attach("one") as one,
    ):
        refs = one.call(verbs.allocate(10_000))
        crash(daemon)
        assert resumed(one, dict.fromkeys(refs[:9_999].tolist(), 1)) == []
        eventually(lambda: daemon.counts()["writing"] == 9_999)
        assert one.call(verbs.allocate(1)).size == 1
        daemon.check()


def test_several_crashes_in_a_row(tmp_path: Path) -> None:
    """The client takes part in every second life of the daemon only."""
    with kept_daemon(tmp_path) as daemon, daemon.attach("one") as one:
        refs = one.call(verbs.allocate(3))
        for life in range(3):
            crash(daemon)
            crash(daemon)
            assert resumed(one, dict.fromkeys(refs.tolist(), 1)) == []
            assert one.epoch == 3 + 2 * life
            more = one.call(verbs.allocate(1))
            assert page_of(int(more[0])) not in page_ids(refs)
            one.call(verbs.free(more))
        daemon.check()


def test_who_resumes_too_late_is_fenced(tmp_path: Path) -> None:
    """It sees so without asking anybody; its own pages come back when it has unmapped the pool."""
    with (
        kept_daemon(tmp_path, daemon_settings=GRACE) as daemon,
        daemon.attach("one") as one,
    ):
        refs = one.call(verbs.acquire(SPACE, PROMPT, 6)).refs
        one.call(verbs.publish(SPACE, PROMPT, refs[:4]))
        crash(daemon)
        assert not one.fenced
        assert daemon.counts()["quarantined"] == 2
        eventually(lambda: one.fenced)
        assert [e["sessions"] for e in daemon.logs("sessions.fenced")] == [[one.session]]
        with pytest.raises(SessionEnded, match="fenced"):
            one.resume(refs, np.ones(6))
        assert daemon.ask(verbs.evict(64))["num_pages"] == 4  # the tree's went
        assert daemon.counts()["quarantined"] == 2  # its own did not: it may be writing
        one.close()
        assert one.fenced
        eventually(lambda: daemon.counts()["free"] == 64)
        assert daemon.sessions() == {}
        with daemon.attach("again") as again:
            assert not again.fenced
            assert again.session > one.session
        daemon.check()


def test_a_cold_start_has_lost_the_pool(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        one = daemon.attach("one")
        refs = one.call(verbs.allocate(3))
        daemon.kill()
        with pytest.raises(DaemonUnreachable):
            one.resume(refs, np.ones(3))
        daemon.start()
        with pytest.raises(PoolLost, match="started cold"):
            one.resume(refs, np.ones(3))
        assert not one.fenced  # nobody gives those pages to anybody
        one.close()
        daemon.check()


def test_only_what_is_over_is_resumed(tmp_path: Path) -> None:
    with kept_daemon(tmp_path) as daemon, daemon.attach("one") as one:
        with pytest.raises(BadRequest, match="nothing to resume"):
            one.resume([], [])
        one.call(verbs.allocate(1))
        one._connection.close()
        with pytest.raises(SessionEnded, match="has not restarted"):
            one.resume([], [])
        with daemon.attach("looks", "admin") as admin:
            crash(daemon)
            with pytest.raises(SessionEnded, match="only a worker's"):
                admin.resume([], [])
