"""All of a daemon's state that a refused request must leave as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import KvdError
from tests.daemon import RunningDaemon


def state(admin: KvdClient) -> Any:
    sessions = admin.call(verbs.sessions())["sessions"]
    status = admin.call(verbs.status())
    del status["uptime_s"], status["refused"], status["refused_access"]
    for session in sessions:
        del session["age_s"], session["ended_s_ago"]
    tree = admin.call(verbs.tree())
    for space in tree["namespaces"]:
        for node in space["nodes"]:
            del node["last_use_s"], node["expires_s"]
    kept = admin.call(verbs.retained())
    for one in kept["retained"]:
        del one["expires_s"]
    return status, sessions, tree, kept, admin.call(verbs.pages())


@contextmanager
def nothing_changes(daemon: RunningDaemon, admin: KvdClient) -> Iterator[None]:
    before = state(admin)
    yield
    assert state(admin) == before
    daemon.check()


@contextmanager
def refused(
    daemon: RunningDaemon, kind: type[KvdError], message: str, **details: Any
) -> Iterator[None]:
    """What is called inside raises this error, and changes nothing; `details` are among its own."""
    with daemon.attach("looks on", "admin") as admin, nothing_changes(daemon, admin):
        with pytest.raises(kind, match=message) as error:
            yield
        assert details.items() <= error.value.details.items()
