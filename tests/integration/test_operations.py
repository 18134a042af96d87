"""Every operation beyond matching and publishing, over real sockets: what it does, and what it
refuses without a change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import (
    BadRequest,
    Detached,
    NoPages,
    NotHeld,
    OverLimit,
    StaleVersion,
    UnknownHandle,
    UnknownRequest,
)
from kvd_shared.namespace import Namespace
from kvd_shared.refs import PageRefs
from tests.daemon import RunningDaemon, running_daemon
from tests.integration.daemon_state import refused

SPACE = Namespace(model="m")
PAGE = 16  # tokens
POOL = 64  # pages


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, page_size=PAGE, num_pages=POOL) as daemon:
        yield daemon
        daemon.check()


@pytest.fixture
def worker(daemon: RunningDaemon) -> Iterator[KvdClient]:
    with daemon.attach("worker") as worker:
        yield worker


def tokens(num_pages: int, more: int = 0) -> list[int]:
    return list(range(num_pages * PAGE + more))


def published(worker: KvdClient, num_pages: int, space: Namespace = SPACE) -> PageRefs:
    refs = worker.call(verbs.allocate(num_pages))
    return worker.call(verbs.publish(space, tokens(num_pages), refs)).refs


# --- pages


def test_leased_pages_are_written_after_use_only(daemon: RunningDaemon, worker: KvdClient) -> None:
    refs = worker.call(verbs.lease(3))
    assert (daemon.counts()["leased"], daemon.counts()["writing"]) == (3, 0)
    with refused(daemon, BadRequest, "is leased: say that it is in use first"):
        worker.call(verbs.publish(SPACE, tokens(1), refs[:1]))
    with refused(daemon, BadRequest, "is leased"):
        worker.call(verbs.make_writable(int(refs[0])))
    worker.call(verbs.use(refs[:2]))
    assert (daemon.counts()["leased"], daemon.counts()["writing"]) == (1, 2)
    with refused(daemon, BadRequest, "is not leased: it is in use already"):
        worker.call(verbs.use(refs))
    with refused(daemon, NoPages, "62 pages wanted, 61 of the pool's 64", missing=1, wanted=62):
        worker.call(verbs.lease(62))
    worker.call(verbs.free(refs))
    with refused(daemon, NotHeld, "freed twice|stale|generation"):
        worker.call(verbs.use(refs[:1]))
    assert daemon.counts()["free"] == POOL


def test_a_partial_page_is_held_to_be_copied(daemon: RunningDaemon, worker: KvdClient) -> None:
    refs = published(worker, 2)
    prompt = [*tokens(1, 10), 999, 999]
    found = worker.call(verbs.match(SPACE, prompt, min_partial=10))
    assert (found.matched_tokens, found.partial_ref, found.partial_tokens) == (PAGE, refs[1], 10)
    assert worker.call(verbs.match(SPACE, prompt, min_partial=11)).partial_ref is None
    assert found.partial_ref is not None
    worker.call(verbs.free([found.partial_ref]))
    # of a prompt that is cached whole, the last page without its last token
    whole = worker.call(verbs.acquire(SPACE, tokens(2), 2, min_partial=1))
    assert (whole.matched_tokens, whole.partial_ref, whole.partial_tokens) == (PAGE, refs[1], 15)
    assert len(whole.refs) == 2 and whole.refs[1] != refs[1]
    [pool] = daemon.ask(verbs.status())["pools"]
    assert pool["tokens_partial"] == 25


def test_retention_is_seen_and_wished_of_held_pages_only(
    daemon: RunningDaemon, worker: KvdClient
) -> None:
    refs = published(worker, 2)
    worker.call(verbs.retain(refs[:1], verbs.Retention(priority=80)))
    worker.call(verbs.retain(refs[1:], verbs.Retention(ttl_s=3600.0)))
    own = worker.call(verbs.allocate(1))
    with refused(daemon, BadRequest, "is not in the tree: publish it first"):
        worker.call(verbs.retain(own, verbs.Retention()))
    with refused(daemon, BadRequest, "priority 101"):
        worker.call(verbs.retain(refs, verbs.Retention(priority=101)))
    worker.call(verbs.free(refs))
    with refused(daemon, NotHeld, "does not hold"):
        worker.call(verbs.retain(refs, verbs.Retention()))
    [space] = daemon.ask(verbs.tree())["namespaces"]
    upper, lower = sorted(space["nodes"], key=lambda node: node["parent"] is not None)
    assert (upper["priority"], upper["expires_s"]) == (80, None)
    assert lower["priority"] == 35 and 3500 < lower["expires_s"] <= 3600


def test_priority_decides_who_is_evicted(daemon: RunningDaemon, worker: KvdClient) -> None:
    first = worker.call(verbs.allocate(1))
    high = verbs.Retention(priority=80)
    worker.call(verbs.publish(SPACE, range(500, 500 + PAGE), first, retention=high))
    later = published(worker, 1)
    worker.call(verbs.free(first))
    worker.call(verbs.free(later))
    worker.call(verbs.allocate(POOL - 1))
    assert worker.call(verbs.probe(SPACE, range(500, 501 + PAGE))) == PAGE
    assert worker.call(verbs.probe(SPACE, tokens(1, 1))) == 0


# --- branching


def test_a_fork_shares_full_pages_and_copies_the_last(
    daemon: RunningDaemon, worker: KvdClient
) -> None:
    refs = worker.call(verbs.allocate(3))
    copies = worker.call(verbs.fork(refs, 2 * PAGE + 5, 2))
    assert len(copies) == 2 and not {*copies.tolist()} & {*refs.tolist()}
    assert len(worker.call(verbs.fork(refs[:2], 2 * PAGE, 1))) == 0
    for _ in range(4):  # its own, two forks', one fork's
        worker.call(verbs.free(refs[:2]))
    with refused(daemon, NotHeld, "does not hold|generation"):
        worker.call(verbs.free(refs[:1]))
    with refused(daemon, BadRequest, "name exactly the pages that hold them"):
        worker.call(verbs.fork(copies, PAGE, 1))
    with refused(daemon, BadRequest, "from 1 to 1024 at once"):
        worker.call(verbs.fork(copies[:1], 5, 0))
    with refused(daemon, NoPages, "62 pages wanted, 61", missing=1):
        worker.call(verbs.fork(copies[:1], 5, 62))
    with refused(daemon, UnknownRequest, "request 9"):
        worker.call(verbs.fork(copies[:1], 5, 1, request=9))
    assert daemon.counts()["free"] == POOL - 3


def test_a_page_is_copied_before_it_is_written(daemon: RunningDaemon, worker: KvdClient) -> None:
    [own] = worker.call(verbs.allocate(1))
    assert worker.call(verbs.make_writable(int(own))) == own
    worker.call(verbs.share([own]))
    copy = worker.call(verbs.make_writable(int(own)))
    assert copy != own
    [sealed] = published(worker, 1)
    assert worker.call(verbs.make_writable(int(sealed))) not in (own, copy, sealed)
    worker.call(verbs.allocate(POOL - 4))
    with refused(daemon, NoPages, "1 pages wanted", missing=1):
        worker.call(verbs.make_writable(int(sealed)))
    with refused(daemon, NotHeld, "the pool has pages 0 to 63"):
        worker.call(verbs.make_writable(POOL))


def test_a_sealed_tail_is_written_and_matched_no_more(
    daemon: RunningDaemon, worker: KvdClient
) -> None:
    own, other = worker.call(verbs.allocate(2)).tolist()
    for wrong in (0, PAGE, -1):
        with refused(daemon, BadRequest, "must be from 1 to 15"):
            worker.call(verbs.seal_tail(own, wrong))
    worker.call(verbs.seal_tail(own, 5))
    assert daemon.counts()["duplicate"] == 1
    with refused(daemon, BadRequest, "is not being written: nothing to seal"):
        worker.call(verbs.seal_tail(own, 5))
    with refused(daemon, BadRequest, "is a sealed tail"):
        worker.call(verbs.publish(SPACE, tokens(1), [own]))
    assert worker.call(verbs.make_writable(own)) not in (own, other)
    worker.call(verbs.free([own]))
    assert daemon.counts()["duplicate"] == 0


# --- what must not come back


def test_what_was_flushed_is_read_on_and_published_no_more(
    daemon: RunningDaemon, worker: KvdClient
) -> None:
    refs = published(worker, 2)
    assert daemon.ask(verbs.flush())["namespaces"] == 1
    assert worker.call(verbs.probe(SPACE, tokens(2, 1))) == 0
    more = worker.call(verbs.allocate(1))
    with refused(daemon, Detached, "was flushed"):
        worker.call(verbs.publish(SPACE, range(100, 116), more, after=int(refs[1])))
    states = daemon.ask(verbs.pages())["map"]
    assert [states[ref & 0xFFFF_FFFF] for ref in refs.tolist()] == [8, 8]
    assert daemon.ask(verbs.who_holds(int(refs[0])))["state"] == "detached"
    published(worker, 2)  # anew
    assert worker.call(verbs.probe(SPACE, tokens(2, 1))) == 2 * PAGE
    worker.call(verbs.free(refs))
    assert daemon.counts()["free"] == POOL - 3


def test_old_weights_are_neither_matched_nor_published(
    daemon: RunningDaemon, worker: KvdClient
) -> None:
    published(worker, 1)
    new = Namespace(model="m", weights_version=3)
    published(worker, 1, new)
    other = Namespace(model="other")
    published(worker, 1, other)
    assert daemon.ask(verbs.raise_weights_version(3, "m"))["namespaces"] == 1
    found = worker.call(verbs.match(SPACE, tokens(1, 1)))
    assert (found.matched_tokens, found.stop) == (0, "stale_version")
    mine = worker.call(verbs.allocate(1))
    with refused(daemon, StaleVersion, "the model is at 3", version=0, minimum=3):
        worker.call(verbs.publish(SPACE, tokens(1), mine))
    for space in (new, other):
        assert worker.call(verbs.probe(space, tokens(1, 1))) == PAGE
    with daemon.attach("admin", "admin") as admin:
        for version in (2, 3):
            with refused(daemon, BadRequest, "must be above the 3 that it is at"):
                admin.call(verbs.raise_weights_version(version, "m"))


# --- sequences


def test_a_sequence_grows_by_its_new_tokens_alone(daemon: RunningDaemon, worker: KvdClient) -> None:
    handle, found = worker.call(verbs.open_sequence(SPACE, tokens(1, 4), ahead=1))
    assert (found.matched_tokens, len(found.refs)) == (0, 3)
    assert (daemon.counts()["writing"], daemon.counts()["leased"]) == (2, 1)
    grown = worker.call(verbs.extend([handle], [20], [1], [900]))
    assert (grown.status, grown.num_new.tolist()) == (["OK"], [0])
    assert worker.call(verbs.probe(SPACE, tokens(1, 1))) == PAGE  # it was full, so it is published
    grown = worker.call(verbs.extend([handle], [21], [12], range(12)))
    assert (grown.status, grown.num_new.tolist(), len(grown.refs)) == (["OK"], [1], 1)
    assert daemon.sessions()["worker"]["sequences"] == 1
    [pool] = daemon.ask(verbs.status())["pools"]
    assert (pool["sequences"], pool["sequence_slots"], pool["wasted_slots"]) == (1, 64, 31)
    worker.call(verbs.close_sequences([handle]))
    assert (daemon.counts()["free"], daemon.counts()["cached"]) == (POOL - 1, 1)
    with refused(daemon, UnknownHandle, f"no open sequence {handle}"):
        worker.call(verbs.close_sequences([handle]))


def test_the_rows_of_an_extend_fare_each_by_itself(
    daemon: RunningDaemon, worker: KvdClient
) -> None:
    one, _ = worker.call(verbs.open_sequence(SPACE, tokens(1)))
    other, _ = worker.call(verbs.open_sequence(SPACE, [7] * PAGE))
    worker.call(verbs.allocate(POOL - 3))
    handles, new = [one, other, 99, one], [1, 1, 1, 0]
    grown = worker.call(verbs.extend(handles, [16, 16, 0, 99], new, [1, 2, 3]))
    assert grown.status == ["OK", "NO_PAGES", "UNKNOWN_HANDLE", "BAD_REQUEST"]
    assert grown.num_new.tolist() == [1, 0, 0, 0]
    worker.call(verbs.close_sequences([one]))
    again = worker.call(verbs.extend([other], [16], [0], []))  # it has its token already
    assert (again.status, again.num_new.tolist()) == (["OK"], [1])
    with refused(daemon, BadRequest, "they must be as many"):
        worker.call(verbs.extend([other], [16], [2], [1]))
    with refused(daemon, BadRequest, "none negative"):
        worker.call(verbs.extend([other, other], [16, 16], [2, -1], [1]))
    with refused(daemon, BadRequest, "a handle is named twice"):
        worker.call(verbs.close_sequences([other, other]))


def test_a_duplicate_is_swapped_in_the_block_table(
    daemon: RunningDaemon, worker: KvdClient
) -> None:
    handle, found = worker.call(verbs.open_sequence(SPACE, tokens(2)))
    [first, _] = found.refs.tolist()
    with daemon.attach("quicker") as quicker:
        [canonical] = published(quicker, 1).tolist()
    grown = worker.call(verbs.extend([handle], [20], [0], []))
    swaps = grown.swap_rows.tolist(), grown.swap_places.tolist(), grown.swap_refs.tolist()
    assert swaps == ([0], [0], [canonical])
    assert daemon.ask(verbs.who_holds(first))["state"] == "duplicate"
    worker.call(verbs.extend([handle], [20], [0], []))
    assert daemon.ask(verbs.who_holds(first))["state"] == "free"


def test_a_forked_sequence_goes_its_own_way(daemon: RunningDaemon, worker: KvdClient) -> None:
    request = worker.call(verbs.begin(3))
    handle, found = worker.call(verbs.open_sequence(SPACE, tokens(1, 5), request))
    worker.call(verbs.extend([handle], [20], [0], []))
    forked = worker.call(verbs.fork_sequence(handle, [request + 1, None]))
    assert forked.copy_from == found.refs[1] and forked.refs.shape == (2, 1)
    grown = worker.call(verbs.extend(forked.sequences, [20, 20], [1, 1], [8, 9]))
    assert grown.status == ["OK", "OK"]
    with refused(daemon, UnknownHandle, "no open sequence 99"):
        worker.call(verbs.fork_sequence(99, [None]))
    with refused(daemon, UnknownRequest, "request 99"):
        worker.call(verbs.fork_sequence(handle, [None, 99]))
    with refused(daemon, BadRequest, "fork into 0 more"):
        worker.call(verbs.fork_sequence(handle, []))
    with refused(daemon, NoPages, "61 pages wanted, 60"):
        worker.call(verbs.fork_sequence(handle, [None] * 61))
    worker.call(verbs.close_sequences([handle, *forked.sequences]))
    assert daemon.counts()["free"] == POOL - 1
    assert worker.call(verbs.probe(SPACE, tokens(1, 1))) == PAGE


def test_a_flushed_sequence_goes_on_unpublished(daemon: RunningDaemon, worker: KvdClient) -> None:
    handle, _ = worker.call(verbs.open_sequence(SPACE, tokens(2)))
    worker.call(verbs.extend([handle], [16], [0], []))
    daemon.ask(verbs.flush())
    assert worker.call(verbs.extend([handle], [32], [1], [5])).status == ["DETACHED"]
    assert worker.call(verbs.extend([handle], [33], [1], [5])).status == ["OK"]
    daemon.ask(verbs.raise_weights_version(1))
    late, _ = worker.call(verbs.open_sequence(SPACE, tokens(1, 1)))
    assert worker.call(verbs.extend([late], [17], [0], [])).status == ["STALE_VERSION"]
    worker.call(verbs.close_sequences([handle, late]))
    assert daemon.counts()["free"] == POOL


# --- limits


@pytest.mark.parametrize(
    ("limit", "call"),
    [
        ("max_prompt_tokens", verbs.match(SPACE, range(101))),
        ("max_prompt_tokens", verbs.publish(SPACE, range(7 * PAGE), [])),
        ("max_prompt_tokens", verbs.open_sequence(SPACE, range(101))),
        ("max_pages_a_session", verbs.allocate(6)),
        ("max_pages_a_session", verbs.lease(6)),
        ("max_pages_a_session", verbs.acquire(SPACE, range(90), 6)),
        ("max_requests_a_session", verbs.begin(4)),
    ],
)
def test_configured_limits_hold(tmp_path: Path, limit: str, call: verbs.Call[object]) -> None:
    most = {"max_prompt_tokens": 100, "max_pages_a_session": 5, "max_requests_a_session": 3}
    settings = "[pool.limits]\n" + "".join(f"{name} = {value}\n" for name, value in most.items())
    with (
        running_daemon(tmp_path, page_size=PAGE, settings=settings) as daemon,
        daemon.attach() as worker,
    ):
        with refused(daemon, OverLimit, limit, limit=limit, most=most[limit]):
            worker.call(call)
        worker.call(verbs.begin(3))
        worker.call(verbs.acquire(SPACE, np.arange(80), 5))
