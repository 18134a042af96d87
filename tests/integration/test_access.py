"""Users, groups and roles: who gets the pool, who gets answers, and the record of who got none."""

from __future__ import annotations

import os
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import NotAllowed
from kvd_shared.namespace import Namespace
from tests.daemon import RunningDaemon, running_daemon
from tests.integration.children import child
from tests.integration.other_user import (
    GROUP,
    OTHER,
    STRANGER,
    attach_raw,
    become,
    give_to_group,
    needs_root,
    open_wide,
    try_everything,
)

pytestmark = needs_root
SPACE = Namespace(model="m")
REFUSED = ("NOT_ALLOWED", "role_not_allowed", 0)


def tried_by(
    daemon: RunningDaemon,
    uid: int,
    gid: int,
    groups: tuple[int, ...] = (),
    token: bytes = bytes(16),
) -> dict[str, Any]:
    run = partial(try_everything, ids=(uid, gid, groups), token=token)
    with child(run, daemon.socket_dir, 0) as somebody:
        found: dict[str, Any] = somebody.says()
        somebody.end()
    return found


def test_a_stranger_does_not_reach_the_sockets(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        give_to_group(daemon, GROUP)
        found = tried_by(daemon, STRANGER, STRANGER)
        for role in ("worker", "admin", "observer"):
            assert found[role] == ("PermissionError", None, 0)
        modes = {p.name: p.stat().st_mode & 0o777 for p in daemon.socket_dir.glob("*.sock")}
        assert modes == {"lease.sock": 0o660, "rpc.sock": 0o660}
        assert {p.stat().st_gid for p in daemon.socket_dir.glob("*.sock")} == {GROUP}


def test_a_stranger_at_the_sockets_gets_neither_fds_nor_answers(tmp_path: Path) -> None:
    """Behind the files' modes, which are open here, stands the list of who may."""
    with running_daemon(tmp_path) as daemon, daemon.attach("good") as good:
        open_wide(daemon)
        good.call(verbs.allocate(3))
        found = tried_by(daemon, STRANGER, STRANGER, token=good._codec._token)
        assert [found[role] for role in ("worker", "admin", "observer")] == [REFUSED] * 3
        assert found["rpc"]["code"] == "NOT_ALLOWED"
        assert found["rpc"]["details"] == {"reason": "other_user"}  # tells nothing of the session
        audited = daemon.logs("access.refused")
        assert [(e["channel"], e["role"], e["reason"]) for e in audited] == [
            ("lease", "worker", "role_not_allowed"),
            ("lease", "admin", "role_not_allowed"),
            ("lease", "observer", "role_not_allowed"),
            ("rpc", None, "other_user"),
        ]
        assert {(e["uid"], e["pid"]) for e in audited} == {(STRANGER, found["pid"])}
        status = daemon.ask(verbs.status())
        assert status["refused_access"] == {"role_not_allowed": 3, "other_user": 1}
        assert daemon.counts()["writing"] == 3
        assert good.call(verbs.probe(SPACE, [1])) == 0
        daemon.check()


@pytest.mark.parametrize("how", ["own group", "supplementary group"])
def test_members_of_the_sockets_group_work_and_look_on(tmp_path: Path, how: str) -> None:
    """What is so without any configuration."""
    gid, groups = (GROUP, ()) if how == "own group" else (STRANGER, (5, GROUP, 7))
    with running_daemon(tmp_path) as daemon:
        give_to_group(daemon, GROUP)
        found = tried_by(daemon, STRANGER, gid, groups)
        assert found["worker"] == ("attached", "default", 2)
        assert found["observer"] == ("attached", None, 0)
        assert found["admin"] == REFUSED


def test_a_configured_rule_replaces_the_standard_one(tmp_path: Path) -> None:
    """Also for root: only who is named is admitted."""
    rules = f"""
[access]
worker_users = [{OTHER}]
admin_users = ["root"]
observer_groups = [{STRANGER}]
"""
    with running_daemon(tmp_path, settings=rules) as daemon:
        open_wide(daemon)
        assert attach_raw(daemon.socket_dir, "worker")[0]["error"]["code"] == "NOT_ALLOWED"
        other = tried_by(daemon, OTHER, OTHER)
        assert (other["worker"][0], other["admin"], other["observer"]) == (
            "attached",
            REFUSED,
            REFUSED,
        )
        stranger = tried_by(daemon, STRANGER, STRANGER)
        assert (stranger["worker"], stranger["admin"]) == (REFUSED, REFUSED)
        assert stranger["observer"] == ("attached", None, 0)
        with daemon.attach("root", "observer") as admin:  # who may be admin may look on
            assert admin.call(verbs.status())["num_sessions"] == 1


def observe(socket_dir: Path, test: Connection, n: int) -> None:
    """A member of the group that is only an observer tries all that there is."""
    become(STRANGER, STRANGER, (GROUP,))
    with KvdClient.attach(socket_dir, name="watcher", role="observer") as kvd:
        done, refused = [], {}
        calls: list[verbs.Call[Any]] = [
            verbs.status(),
            verbs.pages(),
            verbs.tree(),
            verbs.sessions(),
            verbs.audit(),
            verbs.who_holds(0),
            verbs.retained(),
            verbs.explain(SPACE, [1]),
            verbs.evict(1),
            verbs.flush(),
            verbs.raise_weights_version(1),
            verbs.retain_prompt(SPACE, [1]),
            verbs.release_prompt(1),
            verbs.kill_session(1),
            verbs.allocate(1),
            verbs.acquire(SPACE, [1], 1),
            verbs.match(SPACE, [1]),
            verbs.begin(),
            verbs.take_over(bytes(16)),
            verbs.step([verbs.allocate(1)]),
        ]
        for call in calls:
            try:
                kvd.call(call)
                done.append(call.op)
            except NotAllowed as e:
                refused[call.op] = e.details["reason"]
        assert kvd.pool is None and kvd.mapping is None
        test.send((os.getpid(), done, refused))
        test.recv()


def test_an_observer_in_the_group_looks_and_touches_nothing(tmp_path: Path) -> None:
    rules = f"\n[access]\nworker_users = [0]\nobserver_groups = [{GROUP}]\n"
    with running_daemon(tmp_path, settings=rules) as daemon:
        give_to_group(daemon, GROUP)
        with daemon.attach("good") as good:
            good.call(verbs.publish(SPACE, np.arange(16), good.call(verbs.allocate(1))))
            before = daemon.counts()
            with child(observe, daemon.socket_dir, 0) as watcher:
                pid, done, refused = watcher.says()
                watcher.end()
            assert done == ["status", "pages", "tree", "sessions", "audit", "who_holds", "retained"]
            assert set(refused.values()) == {"wrong_role"}
            assert len(refused) == 13
            assert daemon.counts() == before
            audited = daemon.logs("access.refused")
            assert {(e["uid"], e["pid"], e["role"]) for e in audited} == {
                (STRANGER, pid, "observer")
            }
            assert {e["op"].strip("'") for e in audited} == set(refused)
            assert daemon.ask(verbs.status())["refused_access"] == {"wrong_role": 13}
