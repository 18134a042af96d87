"""The publisher on real sockets, beside consumers written as vLLM's, llm-d's and Dynamo's are."""

from __future__ import annotations

import asyncio
import socket as net
from pathlib import Path

import numpy as np
import pytest
import zmq

from kvd.events import replay_server
from kvd.events.log import EventLog
from kvd.events.options import EventsOptions
from kvd.events.publisher import Publisher
from kvd.events.start import new_log
from kvd.events.wire import SNAPSHOT
from kvd_shared.namespace import Namespace
from tests.kvd.events.follower import Follower, Latecomer
from tests.kvd.events.histories import History
from tests.kvd.events.msgpack_reader import decode
from tests.kvd.events.sockets import LAST, answers, consumer, publishing, receive, until

SPACE = Namespace(model="m")


def number(frame: bytes) -> int:
    assert len(frame) == 8
    return int.from_bytes(frame, "big")


def filled_log(num_pages: int) -> EventLog:
    log = EventLog(num_pages, 16, epoch=bytes(16))
    tokens = np.arange(num_pages * 16, dtype="<i4").tobytes()
    log.stored(SPACE, None, tokens, np.arange(num_pages, dtype="<i8").tobytes())
    while log.dirty:
        log.drain(0.0)
    return log


class Subscriber:
    """What vLLM's example and Dynamo's listener do: apply in order, and when a number is missing
    ask the replay socket from there on."""

    def __init__(self, live: zmq.Socket[bytes], replay: zmq.Socket[bytes]) -> None:
        self.live, self.replay = live, replay
        self.state: Follower = Follower()
        self.last: int | None = None
        self.num_replays = 0

    async def hear(self) -> None:
        """One message of the stream."""
        topic, seq, payload = await receive(self.live)
        assert topic == b"kv"
        await self.take(number(seq), payload)

    async def take(self, seq: int, payload: bytes) -> None:
        if (self.last is None and seq > 0) or (self.last is not None and seq > self.last + 1):
            await self.fetch(0 if self.last is None else self.last + 1)
        self.apply(seq, payload)

    async def fetch(self, start: int) -> None:
        self.num_replays += 1
        *batches, end = await answers(self.replay, start.to_bytes(8, "big"))
        assert end == [b"", LAST, b""]
        for topic, seq, payload in batches:
            assert topic == b"kv" and number(seq) >= start
            self.apply(number(seq), payload)

    def apply(self, seq: int, payload: bytes) -> None:
        if self.last is None or seq > self.last:
            self.state.apply(payload)
            self.last = seq


@pytest.mark.parametrize("seed", range(5))
async def test_a_subscriber_that_loses_messages_asks_for_them(seed: int, tmp_path: Path) -> None:
    history = History(seed)
    with (
        publishing(history.log, tmp_path, heartbeat_s=0.01),
        consumer(zmq.SUB, tmp_path) as live,
        consumer(zmq.DEALER, tmp_path) as replay,
    ):
        router = Subscriber(live, replay)
        await router.hear()  # a heartbeat at least: it is connected
        for _ in range(200):
            history.step()
            while live.poll(0):
                if history.dice.random() < 0.3:
                    live.recv_multipart()  # lost on the way
                else:
                    await router.hear()
            await until(lambda: not history.log.dirty)
        history.settle()
        await until(lambda: not history.log.dirty)
        end = history.log.next_seq - 1
        while router.last is None or router.last < end:
            await router.hear()
        assert router.state.pages.keys() == history.matchable()
        assert router.num_replays > 1 and router.state.orphans == 0


async def test_a_req_socket_gets_the_batch_it_missed(tmp_path: Path) -> None:
    """vLLM's own example asks with a REQ socket, which takes one message an answer."""
    log = filled_log(8)
    log.heartbeat(0.0)
    with publishing(log, tmp_path):
        for start in (0, 1):
            with consumer(zmq.REQ, tmp_path) as replay:
                replay.send(start.to_bytes(8, "big"))
                topic, seq, payload = await receive(replay)
                assert topic == b"kv" and number(seq) == start and payload == log.kept[start]


@pytest.mark.parametrize("seed", range(5))
async def test_joining_late_by_a_snapshot(seed: int, tmp_path: Path) -> None:
    """Subscribe, ask for a snapshot, apply it, then what was heard behind its number."""
    history = History(seed, buffer_steps=3)
    for _ in range(150):
        history.step()
    with (
        publishing(history.log, tmp_path, heartbeat_s=0.01),
        consumer(zmq.SUB, tmp_path) as live,
        consumer(zmq.DEALER, tmp_path) as replay,
    ):
        await receive(live)
        await until(lambda: not history.log.dirty)
        (name, cut, header), *slices, end = await answers(replay, SNAPSHOT)
        assert name == SNAPSHOT and end == [b"", LAST, b""]
        about = decode(header)
        assert about["epoch"] == history.log.epoch.hex()
        assert about["first_seq"] == 1000 and number(cut) >= 1000
        state = Latecomer()
        for topic, seq, payload in slices:
            assert topic == b"kv" and seq == cut
            state.apply(payload)
        assert len(state.pages) == about["num_blocks"], "nothing happened meanwhile"
        last = number(cut)
        for _ in range(100):
            history.step()
        history.settle()
        await until(lambda: not history.log.dirty)
        while last < history.log.next_seq - 1:
            _, seq, payload = await receive(live)
            if number(seq) > last:
                assert number(seq) == last + 1
                last += 1
                state.apply(payload)
        assert state.pages.keys() == history.matchable()


async def test_a_restart_is_a_gap_with_a_new_beginning_behind_it(tmp_path: Path) -> None:
    options = EventsOptions(endpoint="ipc://unused")
    tokens = np.arange(32, dtype="<i4").tobytes()
    with consumer(zmq.SUB, tmp_path) as live, consumer(zmq.DEALER, tmp_path) as replay:
        router, epochs = Subscriber(live, replay), set()
        for start_s in (1_790_000_000.0, 1_790_000_060.0):
            log = new_log(2, 16, options, "CPU", start_s)
            log.stored(SPACE, None, tokens[:64], bytes(8))
            with publishing(log, tmp_path, heartbeat_s=0.01):
                end = int(start_s * 1e6) + 3
                while router.last is None or router.last < end:
                    await router.hear()
            assert len(router.state.pages) == 1 and router.state.epoch == log.epoch.hex()
            epochs.add(router.state.epoch)
            tokens = tokens[64:]
        assert len(epochs) == 2 and router.num_replays == 2


async def test_messages_that_are_no_requests(tmp_path: Path) -> None:
    """Each is answered with an error and counted, and the next request works."""
    log = filled_log(4)
    bad = [
        [b"kvd.snapshot"],
        [b"", b"snapshot!"],
        [b"", b""],
        [b"", bytes(7)],
        [b"", bytes(8), b"more"],
        [b"x", bytes(8)],
        [b""] * 5000,
    ]
    with publishing(log, tmp_path) as publisher, consumer(zmq.DEALER, tmp_path) as asking:
        assert publisher.replay is not None
        counts = publisher.replay.counts
        for frames in bad:
            asking.send_multipart(frames)
            empty, name, seq, payload = await receive(asking)
            assert (empty, name, seq) == (b"", b"", LAST)
            assert "a request" in decode(payload)["error"]
        assert counts.bad_requests == counts.requests == len(bad)
        assert len(await answers(asking, bytes(8))) == len(log.kept) + 1
        report = publisher.report()
        assert report["bad_requests"] == len(bad) and report["requests"] == len(bad) + 1
        assert report["num_pages"] == report["pages_stored"] == 4 and report["open"]


async def test_a_huge_message_ends_its_own_connection_only(tmp_path: Path) -> None:
    log = filled_log(4)
    with (
        publishing(log, tmp_path) as publisher,
        consumer(zmq.DEALER, tmp_path) as rude,
        consumer(zmq.DEALER, tmp_path) as polite,
    ):
        rude.send_multipart([b"", bytes(1 << 20)])
        assert len(await answers(polite, bytes(8))) == len(log.kept) + 1
        assert publisher.replay is not None and publisher.replay.counts.requests == 1


async def test_a_reader_that_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer waits, whoever reads gets theirs, and in the end it is given up."""
    log = filled_log(60_000)
    with (
        publishing(log, tmp_path) as publisher,
        consumer(zmq.DEALER, tmp_path, receive_hwm=1) as slow,
        consumer(zmq.DEALER, tmp_path) as quick,
    ):
        assert publisher.replay is not None
        server = publisher.replay
        slow.send_multipart([b"", SNAPSHOT])
        await until(lambda: server.num_answers == 1)
        _, *slices, _ = await answers(quick, SNAPSHOT)
        pages = [
            digest for s in slices for event in decode(s[2])[1] for digest in event["block_hashes"]
        ]
        assert len(set(pages)) == 60_000
        await until(lambda: server.num_answers == 1)
        assert len(log.table.cursors) == 1, "the slow one is waiting"
        monkeypatch.setattr(replay_server, "STALLED_S", 0.0)
        await until(lambda: server.num_answers == 0)
        assert server.counts.given_up == 1 and not log.table.cursors


async def test_a_reader_that_is_gone(tmp_path: Path) -> None:
    log = filled_log(60_000)
    with publishing(log, tmp_path) as publisher:
        assert publisher.replay is not None
        server = publisher.replay
        with consumer(zmq.DEALER, tmp_path, receive_hwm=1) as leaving:
            leaving.send_multipart([b"", SNAPSHOT])
            await until(lambda: server.num_answers == 1)
        await until(lambda: server.num_answers == 0)
        assert server.counts.given_up == 1 and not log.table.cursors


async def test_a_connection_has_one_answer_at_a_time(tmp_path: Path) -> None:
    """Who asks again gets the new answer, behind what was sent of the old one."""
    log = filled_log(60_000)
    with publishing(log, tmp_path) as publisher, consumer(zmq.DEALER, tmp_path) as asking:
        assert publisher.replay is not None
        for _ in range(50):
            asking.send_multipart([b"", SNAPSHOT])
        last = log.next_seq - 1
        messages = await answers(asking, last.to_bytes(8, "big"))
        assert messages[-2] == [b"kv", last.to_bytes(8, "big"), log.kept[last]]
        assert len(messages) < 900, "51 whole answers?"
        assert publisher.replay.counts.requests == 51 and not log.table.cursors


async def test_answers_under_way_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_server, "MAX_ANSWERS", 1)
    log = filled_log(60_000)
    with (
        publishing(log, tmp_path) as publisher,
        consumer(zmq.DEALER, tmp_path, receive_hwm=1) as slow,
        consumer(zmq.DEALER, tmp_path) as other,
    ):
        assert publisher.replay is not None
        server = publisher.replay
        slow.send_multipart([b"", SNAPSHOT])
        await until(lambda: server.num_answers == 1)
        ((_, _, payload),) = await answers(other, bytes(8))
        assert "ask again" in decode(payload)["error"]
        assert server.counts.refused == 1


async def test_a_slow_subscriber_finds_a_hole(tmp_path: Path) -> None:
    """What is over the high-water mark is dropped for it: the publisher neither waits nor keeps."""
    log = filled_log(4)
    with (
        publishing(log, tmp_path, heartbeat_s=0.01, hwm=5) as publisher,
        consumer(zmq.SUB, tmp_path, receive_hwm=1) as live,
    ):
        _, first, _ = await receive(live)
        for _ in range(20_000):
            publisher._send(*log.heartbeat(0.0))
        numbers = [number(first)]
        while numbers[-1] < log.next_seq - 1:
            numbers.append(number((await receive(live))[1]))
        assert numbers == sorted(set(numbers)) and len(numbers) < 20_000


async def test_what_fails_inside_ends_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather no stream than one that lacks something and goes on."""
    log = filled_log(4)
    with publishing(log, tmp_path) as publisher:
        monkeypatch.setattr(log, "drain", lambda now: 1 / 0)
        log.removed(bytes(8))
        await until(lambda: not publisher.is_open)
        assert not log.dirty
        assert not (tmp_path / "live").exists() and not (tmp_path / "replay").exists()


async def test_an_endpoint_that_is_taken(tmp_path: Path) -> None:
    with net.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        for options in (
            EventsOptions(endpoint=endpoint),
            EventsOptions(endpoint=f"ipc://{tmp_path}/live", replay_endpoint=endpoint),
        ):
            with pytest.raises(OSError, match=f"cannot publish events on {endpoint}"):
                Publisher(filled_log(1), options, asyncio.get_running_loop())
