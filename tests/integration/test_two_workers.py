"""What one worker does with another's work: takes a sequence over, or waits for a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import BadRequest, NotHeld, UnknownHandle, UnknownRequest
from kvd_shared.namespace import Namespace
from kvd_shared.refs import page_ids
from kvd_shared.rpc import Notice
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.children import child
from tests.integration.daemon_state import refused

SPACE = Namespace(model="m")
PAGE = 16  # tokens
POOL = 64  # pages
RATE = 1.0  # tokens a second: whoever computes like this rather waits


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, page_size=PAGE, num_pages=POOL) as daemon:
        yield daemon
        daemon.check()


# --- what the second process runs


def give_a_sequence(socket_dir: Path, test: Connection, tail_tokens: int) -> None:
    """Two full pages and a tail, each byte of page i is i + 1; gives them away and ends."""
    with KvdClient.attach(socket_dir, name="gives") as kvd:
        assert kvd.pool is not None and kvd.mapping is not None
        refs = kvd.call(verbs.allocate(3))
        memory = np.frombuffer(kvd.mapping.write_view(), np.uint8)
        memory = memory.reshape(-1, kvd.pool.layout.page_bytes)
        for i, page in enumerate(page_ids(refs)):
            memory[page] = i + 1
        kvd.call(verbs.publish(SPACE, range(2 * PAGE), refs[:2]))
        kvd.call(verbs.seal_tail(int(refs[2]), tail_tokens))
        test.send((kvd.call(verbs.hand_over(refs)), refs.tolist()))
        del memory
    test.recv()


def compute(socket_dir: Path, test: Connection, num_pages: int) -> None:
    """Announces a prompt of so many pages and publishes one each time it is told to go on; a page
    short of its end it gives up."""
    with KvdClient.attach(socket_dir, name="computes") as kvd:
        request = kvd.call(verbs.begin())
        prompt = np.arange(num_pages * PAGE)
        found = kvd.call(verbs.acquire(SPACE, prompt, num_pages, request, announce=True))
        test.send(request)
        after = None
        for i in range(num_pages - 1):
            test.recv()
            part = slice(i * PAGE, (i + 1) * PAGE)
            kvd.call(verbs.publish(SPACE, prompt[part], found.refs[i : i + 1], after))
            after = int(found.refs[i])
        test.recv()
        kvd.call(verbs.step([verbs.free(found.refs), verbs.end(request)]))
        test.recv()


# --- handing over


def test_a_sequence_outlives_the_worker_that_gave_it(daemon: RunningDaemon) -> None:
    with (
        child(give_a_sequence, daemon.socket_dir, 5) as giver,
        daemon.attach("takes") as taker,
    ):
        ticket, given = giver.says()
        giver.end()
        counts = daemon.counts()
        assert (counts["active"], counts["duplicate"], counts["free"]) == (2, 1, POOL - 3)
        [holder] = daemon.ask(verbs.who_holds(given[0] & 0xFFFF_FFFF))["holders"]
        assert holder["name"].startswith("ticket of session")
        with refused(daemon, UnknownHandle, "no such ticket"):
            taker.call(verbs.take_over(bytes(16)))
        refs, tail_tokens = taker.call(verbs.take_over(ticket))
        assert (refs.tolist(), tail_tokens) == (given, 5)
        assert taker.pool is not None and taker.mapping is not None
        memory = np.frombuffer(taker.mapping.read_view(), np.uint8)
        memory = memory.reshape(-1, taker.pool.layout.page_bytes)
        assert [set(memory[page].tolist()) for page in page_ids(refs)] == [{1}, {2}, {3}]
        with refused(daemon, UnknownHandle, "it was taken already, or has expired"):
            taker.call(verbs.take_over(ticket))
        copy = taker.call(verbs.make_writable(int(refs[2])))
        assert copy not in given
        taker.call(verbs.free([*refs.tolist(), copy]))
        del memory
    assert (daemon.counts()["free"], daemon.counts()["cached"]) == (POOL - 2, 2)


def test_only_sealed_pages_that_are_held_travel(daemon: RunningDaemon) -> None:
    with daemon.attach("gives") as giver, daemon.attach("other") as other:
        own, leased = giver.call(verbs.allocate(1)), giver.call(verbs.lease(1))
        for refs in (own, leased):
            with refused(daemon, BadRequest, "is not sealed"):
                giver.call(verbs.hand_over(refs))
        with refused(daemon, BadRequest, "no pages"):
            giver.call(verbs.hand_over([]))
        giver.call(verbs.publish(SPACE, range(PAGE), own))
        for ttl_s in (0.0, -1.0, 601.0, float("nan")):
            with refused(daemon, BadRequest, "must be above 0 and at most 600"):
                giver.call(verbs.hand_over(own, ttl_s))
        with refused(daemon, NotHeld, "does not hold"):
            other.call(verbs.hand_over(own))


def test_a_ticket_that_nobody_takes_expires(daemon: RunningDaemon) -> None:
    with daemon.attach("gives") as giver:
        own = giver.call(verbs.allocate(1))
        giver.call(verbs.seal_tail(int(own[0]), 3))
        ticket = giver.call(verbs.hand_over(own, ttl_s=0.05))
        eventually(lambda: daemon.counts()["free"] == POOL)
        with refused(daemon, UnknownHandle, "has expired"):
            giver.call(verbs.take_over(ticket))


# --- announcing and waiting


def test_who_waits_hears_how_far_it_is(daemon: RunningDaemon) -> None:
    """Three of four pages come; the waiter wants the first two."""
    with child(compute, daemon.socket_dir, 4) as computing, daemon.attach("waits") as waiting:
        computing.says()
        request, prompt = waiting.call(verbs.begin()), np.arange(2 * PAGE + 1)
        found = waiting.call(verbs.acquire(SPACE, prompt, 3, request, own_rate=RATE))
        assert (found.stop, found.pending_tokens, len(found.refs)) == ("pending", 2 * PAGE, 0)
        assert daemon.sessions()["waits"]["held_pages"] == 0
        computing.go_on()
        assert eventually(waiting.notices) == [Notice("progress", request, PAGE)]
        computing.go_on()
        assert eventually(waiting.notices) == [Notice("ready", request, 2 * PAGE)]
        found = waiting.call(verbs.acquire(SPACE, prompt, 3, request, own_rate=RATE))
        assert (found.stop, found.matched_tokens, len(found.refs)) == ("limit", 2 * PAGE, 3)
        [pool] = daemon.ask(verbs.status())["pools"]
        assert (pool["announced_requests"], pool["requests_waited"]) == (1, 1)
        computing.go_on()
        assert waiting.notices() == []


def test_who_waits_hears_that_no_more_comes(daemon: RunningDaemon) -> None:
    """The one computes and gives up a page before the end; another is killed."""
    with daemon.attach("waits") as waiting:
        request, prompt = waiting.call(verbs.begin()), np.arange(3 * PAGE + 1)
        with child(compute, daemon.socket_dir, 2) as computing:
            computing.says()
            waits = waiting.call(verbs.wait(request, SPACE, prompt, RATE))
            assert waits is not None and waits.pending_tokens == 2 * PAGE
            computing.go_on()
            assert eventually(waiting.notices) == [Notice("progress", request, PAGE)]
            computing.go_on()
            assert eventually(waiting.notices) == [Notice("ended", request, PAGE)]
            assert waiting.call(verbs.wait(request, SPACE, prompt, RATE)) is None
            computing.end()
        with child(compute, daemon.socket_dir, 3) as computing:
            computing.says()
            assert waiting.call(verbs.wait(request, SPACE, prompt, RATE)) is not None
            computing.process.kill()
            assert eventually(waiting.notices) == [Notice("ended", request, PAGE)]


def test_who_may_not_announce_or_wait(daemon: RunningDaemon) -> None:
    with daemon.attach("one") as one, daemon.attach("other") as other:
        idle, running = one.call(verbs.begin()), one.call(verbs.begin())
        one.call(verbs.acquire(SPACE, range(3 * PAGE), 3, running, announce=True))
        with refused(daemon, BadRequest, "has no pages: only what is being computed"):
            one.call(verbs.announce(idle, SPACE, range(PAGE)))
        with refused(daemon, BadRequest, "has pages: only one that holds none may wait"):
            one.call(verbs.wait(running, SPACE, range(3 * PAGE), RATE))
        with refused(daemon, UnknownRequest, f"request {idle}"):
            other.call(verbs.announce(idle, SPACE, range(PAGE)))
        with refused(daemon, UnknownRequest, f"request {idle}"):
            other.call(verbs.wait(idle, SPACE, range(PAGE), RATE))
        fast = one.call(verbs.wait(idle, SPACE, range(3 * PAGE), 1e9))
        assert fast is not None, "nobody knows yet how fast the other is"
        one.call(verbs.publish(SPACE, range(PAGE), one.call(verbs.allocate(1))))
        assert one.call(verbs.wait(idle, SPACE, range(3 * PAGE), 1e9)) is None  # it is slower
