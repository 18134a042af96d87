"""What operators change over real sockets, what they are refused, and what bounds everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import BadRequest, NoPages, OverLimit, OverQuota, UnknownHandle, UnknownPool
from kvd_shared.namespace import Namespace
from kvd_shared.page_state import PageState
from kvd_shared.refs import PageRefs
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.daemon_state import refused

SPACE = Namespace(model="m")
PAGE = 16  # tokens
POOL = 32  # pages
QUOTA = 8


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    settings = f"operator_quota = {QUOTA / POOL}\n"
    with running_daemon(tmp_path, page_size=PAGE, num_pages=POOL, settings=settings) as daemon:
        yield daemon
        daemon.check()


@pytest.fixture
def admin(daemon: RunningDaemon) -> Iterator[KvdClient]:
    with daemon.attach("admin", "admin") as admin:
        yield admin


@pytest.fixture
def worker(daemon: RunningDaemon) -> Iterator[KvdClient]:
    with daemon.attach("worker") as worker:
        yield worker


def published(
    worker: KvdClient, num_pages: int, first: int = 0, space: Namespace = SPACE
) -> PageRefs:
    refs = worker.call(verbs.allocate(num_pages))
    return worker.call(verbs.publish(space, prompt(num_pages, first), refs)).refs


def prompt(num_pages: int, first: int = 0) -> range:
    return range(first, first + num_pages * PAGE)


# --- retaining


def test_what_is_retained_is_never_evicted(
    daemon: RunningDaemon, admin: KvdClient, worker: KvdClient
) -> None:
    worker.call(verbs.free(published(worker, 2)))
    worker.call(verbs.free(published(worker, 3, 1000)))
    kept = admin.call(verbs.retain_prompt(SPACE, prompt(2)))
    assert (kept["number"], kept["tokens"]) == (1, 2 * PAGE)
    with refused(daemon, NoPages, "31 pages wanted, 30 of the pool's 32", missing=1):
        worker.call(verbs.allocate(31))
    worker.call(verbs.free(worker.call(verbs.allocate(30))))
    assert worker.call(verbs.probe(SPACE, [*prompt(2), 1])) == 2 * PAGE
    assert worker.call(verbs.probe(SPACE, [*prompt(3, 1000), 1])) == 0
    admin.call(verbs.release_prompt(1))
    assert len(worker.call(verbs.allocate(32))) == 32


def test_the_quota_counts_pages_once(
    daemon: RunningDaemon, admin: KvdClient, worker: KvdClient
) -> None:
    worker.call(verbs.free(published(worker, QUOTA)))
    worker.call(verbs.free(published(worker, 1, 1000)))
    admin.call(verbs.retain_prompt(SPACE, prompt(QUOTA)))
    admin.call(verbs.retain_prompt(SPACE, prompt(QUOTA)))  # the same once more
    with refused(daemon, OverQuota, "9 pages would be retained", wanted=9, most=QUOTA):
        admin.call(verbs.retain_prompt(SPACE, prompt(1, 1000)))
    for number in (1, 2):
        admin.call(verbs.release_prompt(number))
    admin.call(verbs.retain_prompt(SPACE, prompt(1, 1000)))


def test_a_retention_ends_by_itself(
    daemon: RunningDaemon, admin: KvdClient, worker: KvdClient
) -> None:
    worker.call(verbs.free(published(worker, 2)))
    admin.call(verbs.retain_prompt(SPACE, prompt(2), 0.05))
    eventually(lambda: not admin.call(verbs.retained())["retained"])
    assert admin.call(verbs.evict(POOL))["num_pages"] == 2


def test_what_cannot_be_retained(
    daemon: RunningDaemon, admin: KvdClient, worker: KvdClient
) -> None:
    published(worker, 1)
    with refused(daemon, BadRequest, "nothing of these tokens is cached"):
        admin.call(verbs.retain_prompt(SPACE, prompt(1, 1000)))
    for duration_s in (0.0, -1.0, float("nan"), float("inf")):
        with refused(daemon, BadRequest, "duration_s = .* must be above 0"):
            admin.call(verbs.retain_prompt(SPACE, prompt(1), duration_s))
    with refused(daemon, UnknownHandle, "nothing is retained under number 1"):
        admin.call(verbs.release_prompt(1))


# --- evicting, flushing, raising


def test_eviction_spares_what_is_held(
    daemon: RunningDaemon, admin: KvdClient, worker: KvdClient
) -> None:
    held = published(worker, 2)
    worker.call(verbs.free(published(worker, 3, 1000)))
    assert admin.call(verbs.evict(2))["num_pages"] == 2
    assert worker.call(verbs.probe(SPACE, [*prompt(3, 1000), 1])) == PAGE
    assert admin.call(verbs.evict(1 << 60))["num_pages"] == 1
    worker.call(verbs.free(held))
    for wrong in (0, -1):
        with refused(daemon, BadRequest, f"num_pages = {wrong} must be at least 1"):
            admin.call(verbs.evict(wrong))
    [pool] = daemon.ask(verbs.status())["pools"]
    assert pool["left_pages"]["evicted"] == 3


def test_a_flush_by_its_fields(admin: KvdClient, worker: KvdClient) -> None:
    spaces = [
        Namespace(model=model, weights_version=version, adapter=adapter, salt=salt)
        for model in ("m", "n")
        for version in (0, 1)
        for adapter in (b"", b"a")
        for salt in (b"", b"s")
    ]
    for space in spaces:
        worker.call(verbs.free(published(worker, 1, space=space)))

    def cached() -> set[Namespace]:
        return {s for s in spaces if worker.call(verbs.probe(s, [*prompt(1), 1]))}

    assert cached() == set(spaces)
    assert admin.call(verbs.flush("m", 1, b"a", b"s"))["namespaces"] == 1
    assert cached() == set(spaces) - {spaces[7]}
    assert admin.call(verbs.flush(salt=b""))["namespaces"] == 8
    assert all(s.salt == b"s" for s in cached())
    assert admin.call(verbs.flush("n"))["namespaces"] == 4
    assert all(s.model == "m" for s in cached())
    assert admin.call(verbs.flush("absent"))["namespaces"] == 0
    assert admin.call(verbs.flush())["namespaces"] == 3
    assert cached() == set()


def test_flushed_pages_come_back(
    daemon: RunningDaemon, admin: KvdClient, worker: KvdClient
) -> None:
    held = published(worker, 2)
    worker.call(verbs.free(published(worker, 3, 1000)))
    admin.call(verbs.flush())
    eventually(lambda: daemon.counts()["free"] == POOL - 2)
    [pool] = daemon.ask(verbs.status())["pools"]
    assert (pool["detached_pages"], pool["counts"]["active"]) == (2, 2)
    worker.call(verbs.free(held))
    eventually(lambda: daemon.counts()["free"] == POOL)


def test_versions_are_numbers_that_rise(daemon: RunningDaemon, admin: KvdClient) -> None:
    admin.call(verbs.raise_weights_version(5))
    for version, model in [(5, None), (4, "m"), (5, "m"), (0, None), (1 << 63, None)]:
        with refused(daemon, BadRequest, f"weights version {version}: must be above the 5"):
            admin.call(verbs.raise_weights_version(version, model))
    admin.call(verbs.raise_weights_version(6, "m"))


def test_a_pool_that_is_not_there(daemon: RunningDaemon, admin: KvdClient) -> None:
    calls: list[verbs.Call[Any]] = [
        verbs.evict(1, "none"),
        verbs.flush(pool="none"),
        verbs.raise_weights_version(1, pool="none"),
        verbs.retain_prompt(SPACE, [1], pool="none"),
        verbs.release_prompt(1, "none"),
        verbs.retained("none"),
        verbs.explain(SPACE, [1], "none"),
        verbs.who_holds(0, "none"),
    ]
    for call in calls:
        with refused(daemon, UnknownPool, "no pool 'none'; there are: default"):
            admin.call(call)


# --- who holds what


def test_who_holds_a_page_and_in_which_state(
    daemon: RunningDaemon, admin: KvdClient, worker: KvdClient
) -> None:
    refs = published(worker, 2).tolist()
    worker.call(verbs.share(refs[1:]))
    [writing] = worker.call(verbs.allocate(1)).tolist()
    [leased] = worker.call(verbs.lease(1)).tolist()
    with daemon.attach("other") as other:
        other.call(verbs.match(SPACE, [*prompt(1), 1]))
        first = admin.call(verbs.who_holds(refs[0]))
        assert (first["state"], first["position"], first["generation"]) == ("shared", 0, 0)
        assert {(h["name"], h["holds"]) for h in first["holders"]} == {("worker", 1), ("other", 1)}
    second = admin.call(verbs.who_holds(refs[1]))
    assert (second["state"], second["position"]) == ("active", 1)
    assert [(h["name"], h["holds"]) for h in second["holders"]] == [("worker", 2)]
    for ref, state in ((writing, "writing"), (leased, "leased")):
        found = admin.call(verbs.who_holds(ref))
        assert (found["state"], found["position"]) == (state, None)
    assert admin.call(verbs.who_holds(POOL - 1))["holders"] == []
    map_ = admin.call(verbs.pages())["map"]
    assert [PageState(map_[r]).name for r in (*refs, writing, leased)] == [
        "ACTIVE", "ACTIVE", "WRITING", "LEASED"
    ]  # fmt: skip
    for page in (-1, POOL):
        with refused(daemon, BadRequest, f"page {page}: the pool has pages 0 to 31"):
            admin.call(verbs.who_holds(page))


# --- bounds for everybody


def test_so_many_processes_and_no_more(tmp_path: Path) -> None:
    with running_daemon(tmp_path, max_sessions=2) as daemon, daemon.attach("first") as first:
        with daemon.attach("second", "admin"):
            with pytest.raises(OverLimit, match=r"2 processes are attached.*max_sessions") as e:
                daemon.attach("third")
            assert e.value.details == {"limit": "max_sessions", "value": 3, "most": 2}
            first.call(verbs.begin())  # and it goes on
        daemon.attach("third").close()
        daemon.check()


def test_token_ids_are_below_the_models_vocabulary(tmp_path: Path, folder: Path) -> None:
    """Which kvd reads in the pool's model folder."""
    from kvd_shared.model_folder import read_model_folder

    size = read_model_folder(folder).vocab_size
    assert size is not None and size < 1000
    with (
        running_daemon(tmp_path, model=folder, page_size=PAGE) as daemon,
        daemon.attach() as worker,
        daemon.attach("admin", "admin") as admin,
    ):
        good, bad = np.full(PAGE, size - 1), np.full(PAGE, size - 1)
        bad[5] = size
        refs = worker.call(verbs.allocate(1))
        message = rf"token 5 has the id {size}: must be from 0 to {size - 1}"
        with refused(daemon, BadRequest, message):
            worker.call(verbs.publish(SPACE, bad, refs))
        for call in (verbs.match(SPACE, bad), verbs.acquire(SPACE, bad, 1)):
            with refused(daemon, BadRequest, message):
                worker.call(call)
        with refused(daemon, BadRequest, message):
            admin.call(verbs.explain(SPACE, bad))
        handle, _ = worker.call(verbs.open_sequence(SPACE, good))
        with refused(daemon, BadRequest, message):
            worker.call(verbs.extend([handle], [0], [PAGE], bad))
        worker.call(verbs.publish(SPACE, good, refs))
        daemon.check()
