"""What consumers make of the stream is what the cache has: all along, joining late, losing some."""

from __future__ import annotations

import pytest

from kvd.cache_check import check_cache
from kvd.events.answers import Replay, Snapshot
from kvd.events.log import EventLog
from kvd.events.start import announce
from kvd.events.wire import END, SNAPSHOT
from tests.kvd.events.follower import Follower, Latecomer
from tests.kvd.events.histories import NUM_PAGES, PAGE_SIZE, History

STEPS = 250


def drained(log: EventLog) -> list[tuple[int, bytes]]:
    batches = []
    while log.dirty:
        batch = log.drain(0.0)
        if batch is not None:
            batches.append(batch)
    return batches


@pytest.mark.parametrize("seed", range(100))
def test_a_follower_has_what_can_be_matched(seed: int) -> None:
    history, follower = History(seed), Follower()
    seen = 0
    for step in range(STEPS):
        history.step()
        if step % 7 == 0:
            for _, payload in drained(history.log):
                follower.apply(payload)
            history.log.table.check()
            # what was flushed may still be announced until it is swept; never the other way round
            assert history.matchable() <= follower.pages.keys()
        if step % 50 == 49:
            history.settle()
            for _, payload in drained(history.log):
                follower.apply(payload)
            assert follower.pages.keys() == history.matchable()
            seen += len(follower.pages)
    assert seen > 20, "a history in which next to nothing was cached shows nothing"
    assert follower.orphans == 0 and history.log.counts.pages_dropped == 0
    assert follower.epoch == history.log.epoch.hex()
    check_cache(history.cache)


class Router:
    """Joins late: snapshot, then the stream behind it; asks for what it missed, and begins again
    when that is not kept any more."""

    def __init__(self, history: History) -> None:
        self.history, self.log = history, history.log
        self.num_snapshots = 0
        self.heard: dict[int, bytes] = {}
        self.join()

    def join(self) -> None:
        self.state, self.seq = Latecomer(), -1
        self.num_snapshots += 1
        self.snapshot: Snapshot | None = Snapshot(self.log, b"", pages_a_slice=3)

    def read_slice(self) -> None:
        """One message of the snapshot. When it is over, the stream."""
        if self.snapshot is None:
            return
        message = self.snapshot.next(0.0)
        assert message is not None
        name, seq, payload = message
        if name == SNAPSHOT:
            self.seq = int.from_bytes(seq, "big", signed=True)
        elif seq == END:
            assert self.snapshot.next(0.0) is None
            self.snapshot.close()
            self.snapshot = None
        else:
            known = set(self.state.pages)
            self.state.apply(payload)
            if not self.log.dirty:  # then nothing that can be matched comes before its parent
                for digest in self.history.matchable() & self.state.pages.keys() - known:
                    parent = self.state.pages[digest][0]
                    assert parent is None or parent in self.state.pages

    def catch_up(self, last: int) -> None:
        """Apply everything up to the number `last`, from what was heard or else from a replay."""
        while self.snapshot is None and self.seq < last:
            if self.seq + 1 in self.heard:
                self.seq += 1
                self.state.apply(self.heard[self.seq])
                continue
            replay = Replay(self.log, b"", self.seq + 1)
            while (message := replay.next(0.0)) is not None:
                if message[1] != END:
                    self.heard[int.from_bytes(message[1], "big")] = message[2]
            if self.seq + 1 not in self.heard:
                self.join()  # it is not kept any longer


@pytest.mark.parametrize("seed", range(100))
def test_who_joins_late_comes_to_the_same(seed: int) -> None:
    """Slices are read between the cache's operations, a third of the batches get lost, and few
    are kept for replay."""
    history = History(seed, buffer_steps=5 + seed)
    log, dice = history.log, history.dice
    for _ in range(dice.randrange(STEPS)):
        history.step()
        if dice.random() < 0.5:
            drained(log)
    router = Router(history)
    for _ in range(60):
        for _ in range(dice.randrange(4)):
            history.step()
        lost = dice.random() < 0.33
        for seq, payload in drained(log):
            if not lost:
                router.heard[seq] = payload
        router.read_slice()
        if dice.random() < 0.3:
            router.catch_up(log.next_seq - 1)
    history.settle()
    router.heard.update(drained(log))
    while router.snapshot is not None or router.seq < log.next_seq - 1:
        router.read_slice()
        router.catch_up(log.next_seq - 1)
    assert router.state.pages.keys() == history.matchable()
    assert not log.table.cursors, "a walk that nobody ends"


@pytest.mark.parametrize("seed", range(10))
def test_events_that_begin_with_a_warm_cache(seed: int) -> None:
    """As after a restart that kept the cache: what is there is announced first."""
    history, follower = History(seed), Follower()
    for _ in range(STEPS):
        history.step()
    history.settle()
    history.log = EventLog(NUM_PAGES, PAGE_SIZE, epoch=bytes(16))
    announce(history.log, history.cache.tree.nodes())
    history.cache.tree.observer = history.log
    for _ in range(50):
        for _, payload in drained(history.log):
            follower.apply(payload)
        assert follower.pages.keys() >= history.matchable()
        history.step()
    history.settle()
    for _, payload in drained(history.log):
        follower.apply(payload)
    assert follower.pages.keys() == history.matchable()
    assert follower.orphans == 0
