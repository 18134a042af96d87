"""The client that users get, in a thread beside the publisher's loop."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from threading import Event as Flag

import pytest

from kvd_shared.events_client import EventsClient
from tests.kvd.events.histories import History
from tests.kvd.events.sockets import publishing, until


class Follower:
    """Follows until it has come to the number `goal`, losing some of the stream on the way."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.client = EventsClient(f"ipc://{folder}/live", f"ipc://{folder}/replay")
        self.dice, self.pages, self.joins = dice, dict[int, tuple[int, ...]](), 0
        self.joined, self.goal = Flag(), 1 << 62

    def run(self) -> None:
        with self.client as client:
            while client.seq is None or client.seq < self.goal:
                for _ in range(self.dice.choice([0, 0, 1, 8])):
                    if client.seq is not None and client._live.poll(20):
                        client._live.recv_multipart()
                for event in client.poll(timeout_s=0.05):
                    self.apply(event)
                self.joined.set()

    def apply(self, event: dict[str, object]) -> None:
        hashes, tokens = event.get("block_hashes", []), event.get("token_ids", [])
        assert isinstance(hashes, list) and isinstance(tokens, list)
        if event["type"] == "AllBlocksCleared":
            self.pages.clear()
            self.joins += 1
        elif event["type"] == "BlockRemoved":
            for digest in hashes:
                self.pages.pop(digest, None)
        else:
            size = len(tokens) // len(hashes)
            self.pages |= {
                digest: tuple(tokens[i * size : (i + 1) * size]) for i, digest in enumerate(hashes)
            }


@pytest.mark.parametrize(
    ("seed", "buffer_steps", "wanted_joins"), [(1, 10_000, 1), (2, 10_000, 1), (3, 2, 4), (4, 2, 4)]
)
async def test_it_comes_to_what_is_cached(
    seed: int, buffer_steps: int, wanted_joins: int, tmp_path: Path
) -> None:
    """With few batches kept it has to join again; a heartbeat tells it of what it lost last."""
    history = History(seed, buffer_steps=buffer_steps)
    with publishing(history.log, tmp_path, heartbeat_s=0.01):
        follower = Follower(tmp_path, random.Random(seed))
        following = asyncio.create_task(asyncio.to_thread(follower.run))
        await until(follower.joined.is_set)
        for steps_left in itertools.count(300, -1):
            if steps_left <= 0 and follower.joins >= wanted_joins:
                break
            history.step()
            await asyncio.sleep(0.0005)
        history.settle()
        await until(lambda: not history.log.dirty)
        follower.goal = history.log.next_seq - 1
        await asyncio.wait_for(following, 20)
    assert follower.pages.keys() == history.matchable()
    assert follower.client.epoch == history.log.epoch.hex()


def test_nobody_there(tmp_path: Path) -> None:
    endpoints = f"ipc://{tmp_path}/live", f"ipc://{tmp_path}/replay"
    with (
        EventsClient(*endpoints, answer_timeout_s=0.01) as client,
        pytest.raises(TimeoutError, match="replay has sent nothing for 10 ms: is kvd up"),
    ):
        client.poll(0)
