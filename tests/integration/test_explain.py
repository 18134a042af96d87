"""Why a match stops: each of explain's reasons, brought about over real sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import BadRequest, OverLimit
from kvd_shared.namespace import Namespace
from tests.daemon import RunningDaemon, running_daemon
from tests.integration.daemon_state import nothing_changes, refused

SPACE = Namespace(model="m", weights_version=1)
PAGE = 16  # tokens
POOL = 16  # pages
TTL_S = 0.3
PROMPT = list(range(3 * PAGE))
SETTINGS = f"""\
[[pool.tenant]]
name = "small"
salt = "small"
max_share = {2 / POOL}
[[pool.tenant]]
name = "brief"
salt = "brief"
ttl_s = {TTL_S}
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, page_size=PAGE, num_pages=POOL, settings=SETTINGS) as daemon:
        yield daemon
        daemon.check()


@pytest.fixture
def worker(daemon: RunningDaemon) -> Iterator[KvdClient]:
    with daemon.attach("worker") as worker:
        yield worker


@pytest.fixture
def admin(daemon: RunningDaemon) -> Iterator[KvdClient]:
    with daemon.attach("admin", "admin") as admin:
        yield admin


def cache(worker: KvdClient, tokens: list[int], space: Namespace = SPACE) -> None:
    """Published and held by nobody."""
    refs = worker.call(verbs.allocate(len(tokens) // PAGE))
    worker.call(verbs.publish(space, tokens, refs))
    worker.call(verbs.free(refs))


def explained(
    admin: KvdClient, why: str, tokens: list[int], space: Namespace = SPACE
) -> dict[str, Any]:
    found: dict[str, Any] = admin.call(verbs.explain(space, tokens))
    assert found["why"] == why
    assert found["stopped_at_page"] * PAGE == found["matched_tokens"]
    return found


def test_all_that_may_match_does(worker: KvdClient, admin: KvdClient) -> None:
    cache(worker, PROMPT)
    assert explained(admin, "limit", [*PROMPT, 1])["matched_tokens"] == 48
    assert explained(admin, "limit", PROMPT)["matched_tokens"] == 32
    found = explained(admin, "page_boundary", [*PROMPT, 1, 2])
    assert (found["matched_tokens"], found["num_tokens"]) == (48, 50)


def test_asking_changes_nothing(daemon: RunningDaemon, worker: KvdClient, admin: KvdClient) -> None:
    cache(worker, PROMPT)
    with nothing_changes(daemon, admin):
        explained(admin, "limit", PROMPT)
        explained(admin, "differs", PROMPT[:20] + [999] * 20)


def test_a_cached_prompt_goes_on_otherwise(worker: KvdClient, admin: KvdClient) -> None:
    cache(worker, PROMPT)
    found = explained(admin, "differs", PROMPT[:20] + [999] * 20)
    assert (found["matched_tokens"], found["differs_at"]) == (16, 20)
    found = explained(admin, "differs", PROMPT[:16] + [999] * 20)
    assert (found["matched_tokens"], found["differs_at"]) == (16, 16)


def test_nothing_like_it_was_published(worker: KvdClient, admin: KvdClient) -> None:
    explained(admin, "never_published", PROMPT)
    cache(worker, PROMPT[:32])
    assert explained(admin, "never_published", [999] * 20)["matched_tokens"] == 0
    assert explained(admin, "never_published", [*PROMPT, 1])["matched_tokens"] == 32


def test_it_is_cached_for_others(worker: KvdClient, admin: KvdClient) -> None:
    cache(worker, PROMPT)
    other = Namespace(model="m", weights_version=1, adapter=b"a", salt=b"t")
    found = explained(admin, "other_namespace", PROMPT, other)["other"]
    assert found == {
        "matched_tokens": 32,
        "differs_in": ["adapter", "salt"],
        "model": "m",
        "weights_version": 1,
    }


def test_it_was_evicted(worker: KvdClient, admin: KvdClient) -> None:
    cache(worker, PROMPT)
    time.sleep(0.1)
    admin.call(verbs.evict(1))
    found = explained(admin, "evicted", [*PROMPT, 1])
    assert found["matched_tokens"] == 32
    assert 0 <= found["left_s_ago"] < 5 and 0.1 <= found["unused_before_s"] < 10
    admin.call(verbs.evict(POOL))
    assert explained(admin, "evicted", [*PROMPT, 1])["matched_tokens"] == 0


def test_its_tenant_had_more_than_its_share(worker: KvdClient, admin: KvdClient) -> None:
    space = Namespace(model="m", salt=b"small")
    cache(worker, PROMPT, space)
    assert explained(admin, "over_share", [*PROMPT, 1], space)["matched_tokens"] == 32


def test_it_expired(worker: KvdClient, admin: KvdClient) -> None:
    space = Namespace(model="m", salt=b"brief")
    cache(worker, PROMPT, space)
    assert worker.call(verbs.probe(space, [*PROMPT, 1])) == 48
    time.sleep(TTL_S + 0.6)  # the timers are looked at twice a second
    found = explained(admin, "expired", [*PROMPT, 1], space)
    assert found["unused_before_s"] >= TTL_S


def test_it_was_flushed(worker: KvdClient, admin: KvdClient) -> None:
    cache(worker, PROMPT)
    admin.call(verbs.flush("m"))
    assert explained(admin, "flushed", PROMPT)["matched_tokens"] == 0


def test_its_weights_are_old(worker: KvdClient, admin: KvdClient) -> None:
    cache(worker, PROMPT)
    admin.call(verbs.raise_weights_version(2, "m"))
    explained(admin, "stale_version", PROMPT)


def test_another_request_is_computing_it(worker: KvdClient, admin: KvdClient) -> None:
    request = worker.call(verbs.begin())
    worker.call(verbs.acquire(SPACE, PROMPT, 3, request, announce=True))
    found = explained(admin, "computing", [*PROMPT, 1])
    assert found["computed_by"] == {"session": worker.session, "request": request, "tokens": 48}


def test_what_is_no_question(daemon: RunningDaemon, admin: KvdClient) -> None:
    with refused(daemon, BadRequest, "no tokens"):
        admin.call(verbs.explain(SPACE, []))
    with refused(daemon, OverLimit, "the limit is 1048576", limit="max_prompt_tokens"):
        admin.call(verbs.explain(SPACE, range((1 << 20) + 1)))
