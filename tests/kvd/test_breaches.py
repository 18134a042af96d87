"""A connection that makes no sense is borne for a while, and then not listened to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import zmq

from kvd.breaches import BURST, ERRORS_PER_S, MAX_CONNECTIONS, Breaches
from kvd_shared import verbs
from kvd_shared.namespace import Namespace
from kvd_shared.rpc import RpcCodec
from tests.daemon import eventually, running_daemon

ONE, OTHER = (b"\0one", (1, 0)), (b"\0other", (1, 0))


def test_a_burst_is_borne_and_one_more_is_not() -> None:
    breaches = Breaches(lambda: 0.0)
    assert not any(breaches.note(ONE) for _ in range(BURST))
    assert not breaches.note(OTHER)
    assert breaches.note(ONE)
    assert (breaches.ignored, breaches.num_ignored) == ({ONE}, 1)


def test_who_errs_rarely_errs_for_ever() -> None:
    now = [0.0]
    breaches = Breaches(lambda: now[0])
    for _ in range(3 * BURST):
        now[0] += 1.001 / ERRORS_PER_S
        assert not breaches.note(ONE)
    assert not any(breaches.note(ONE) for _ in range(BURST - 1))


def test_what_is_remembered_is_bounded() -> None:
    breaches = Breaches(lambda: 0.0)
    for number in range(3 * MAX_CONNECTIONS):
        breaches.note((str(number).encode(), (1, 0)))
        breaches.ignored.add((str(number).encode(), (1, 0)))
        if len(breaches.ignored) > MAX_CONNECTIONS:
            breaches.ignored.clear()
    assert len(breaches._buckets) <= MAX_CONNECTIONS


def test_a_flood_of_garbage_is_not_answered(tmp_path: Path) -> None:
    """Others are; so is the same process over another connection, but its session is over."""
    with running_daemon(tmp_path) as daemon, daemon.attach("other") as other:
        flooder = daemon.attach("flooder")
        flooder.call(verbs.allocate(3))
        sent = 0
        while flooder.alive:
            assert sent < 100 * BURST
            for _ in range(200):
                flooder._socket.send(os.urandom(40))
            sent += 200
            try:
                while True:
                    flooder._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                time.sleep(0.001)
        status = daemon.ask(verbs.status())
        assert status["ignored_connections"] == 1
        assert BURST <= status["refused"]["BAD_REQUEST"] <= BURST + 1000
        [line] = daemon.logs("rpc.ignored")
        assert (line["pid"], line["uid"]) == (os.getpid(), os.geteuid())
        ended = [e["why"] for e in daemon.logs("session.ended") if e["name"] == "flooder"]
        assert ended == ["senseless"]
        flooder._socket.send_multipart(RpcCodec(bytes(16)).request(verbs.begin())[1])
        eventually(lambda: daemon.ask(verbs.status())["ignored_messages"] > 0)
        assert other.call(verbs.probe(Namespace(model="m"), [1])) == 0
        with daemon.attach("again") as again:
            assert again.call(verbs.allocate(1)).size == 1
        assert daemon.counts()["quarantined"] == 3
        flooder._socket.close(linger=0)
        daemon.check()
