"""Two workers that want more pages than there are: who has to give way, and that both finish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvd_shared import verbs
from kvd_shared.async_client import AsyncKvdClient
from kvd_shared.client import KvdClient
from kvd_shared.errors import NoPages, UnknownRequest
from kvd_shared.namespace import Namespace
from kvd_shared.rpc import Notice
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.children import child

NAMESPACE = Namespace(model="m")
PAGE = 16  # tokens


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, page_size=PAGE) as daemon:
        yield daemon


def grow(socket_dir: Path, test: Connection, num_pages: int) -> None:
    """Decodes one sequence of `num_pages` pages page by page, and gives way when asked to."""
    with KvdClient.attach(socket_dir, name="grows") as kvd:
        request, yields = kvd.call(verbs.begin()), 0
        refs: list[int] = []
        test.send(request)
        test.recv()
        while len(refs) < num_pages:
            with suppress(NoPages):
                refs += kvd.call(verbs.allocate(1, request)).tolist()
            time.sleep(0.002)
            if any(notice == Notice("yield", request) for notice in kvd.notices()):
                kvd.call(verbs.step([verbs.free(refs), verbs.yielded(request)]))
                refs, yields = [], yields + 1
        kvd.call(verbs.step([verbs.free(refs), verbs.end(request)]))
        test.send(yields)
        test.recv()


def test_two_workers_that_need_more_than_there_is_both_finish(daemon: RunningDaemon) -> None:
    """Each needs 60 % of the pool at once. The older one never has to give way."""
    where = daemon.socket_dir
    with child(grow, where, 38) as one, child(grow, where, 38) as another:
        both = {one.says(): one, another.says(): another}
        for worker in both.values():
            worker.go_on()
        yields = {number: worker.says() for number, worker in both.items()}
        for worker in both.values():
            worker.end()
    assert yields[1] == 0
    asked = {line["request"] for line in daemon.logs("request.asked_to_yield")}
    assert asked == ({2} if yields[2] else set())
    assert daemon.counts()["free"] == 64
    daemon.check()


def test_the_younger_sequence_is_asked_to_yield(daemon: RunningDaemon) -> None:
    with daemon.attach("older") as older, daemon.attach("younger") as younger:
        old, young = older.call(verbs.begin()), younger.call(verbs.begin())
        held = younger.call(verbs.allocate(60, young))
        assert younger.notices() == []
        with pytest.raises(NoPages) as refused:
            older.call(verbs.allocate(10, old))
        assert refused.value.details == {"missing": 6, "wanted": 10}
        assert eventually(younger.notices) == [Notice("yield", young)]
        assert older.notices() == []
        with pytest.raises(UnknownRequest):
            older.call(verbs.yielded(young))
        younger.call(verbs.step([verbs.free(held), verbs.yielded(young)]))
        assert len(older.call(verbs.allocate(10, old))) == 10
        with pytest.raises(NoPages):
            younger.call(verbs.allocate(60, young))
        daemon.check()


async def test_the_asyncio_client_hears_notices_between_its_calls(daemon: RunningDaemon) -> None:
    younger = await AsyncKvdClient.attach(daemon.socket_dir, name="younger")
    async with younger:
        with daemon.attach("older") as older:
            old, young = older.call(verbs.begin()), await younger.call(verbs.begin())
            held = await younger.call(verbs.allocate(60, young))
            with pytest.raises(NoPages):
                older.call(verbs.allocate(10, old))
            notice = await asyncio.wait_for(younger.notices.get(), 5.0)
            assert notice == Notice("yield", young)
            matches = [younger.call(verbs.match(NAMESPACE, range(n))) for n in range(1, 50)]
            assert [m.matched_tokens for m in await asyncio.gather(*matches)] == [0] * 49
            await younger.call(verbs.free(held))
    assert daemon.counts()["free"] == 64
    daemon.check()
