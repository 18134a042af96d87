"""The log alone, told by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvd.events import log as log_module
from kvd.events.answers import Replay, answer
from kvd.events.hashes import namespace_seed, page_hashes
from kvd.events.log import PAGES_A_PORTION, EventLog
from kvd.events.options import EventsOptions
from kvd.events.wire import END
from kvd_shared.namespace import Namespace
from kvd_shared.refs import GENERATION
from tests.kvd.events.follower import Follower, expected_hashes
from tests.kvd.events.msgpack_reader import decode

SPACE = Namespace(model="m", salt=b"s")
EPOCH = bytes(range(16))


def new_log(num_pages: int = 1024, buffer_steps: int = 1000) -> EventLog:
    """With its first batch, AllBlocksCleared, drained."""
    log = EventLog(num_pages, 2, epoch=EPOCH, first_seq=7, buffer_steps=buffer_steps)
    assert log.drain(0.0) is not None
    return log


def tokens(*pages: int) -> bytes:
    """Two tokens a page, both the page's number."""
    return np.repeat(np.array(pages, "<i4"), 2).tobytes()


def refs(*refs: int) -> bytes:
    return np.array(refs, "<i8").tobytes()


def events(log: EventLog) -> list[Any]:
    batch = log.drain(1.0)
    return [] if batch is None else decode(batch[1])[1]


def test_hashes_are_the_documented_ones_on_every_host() -> None:
    text = tokens(1, 2, 3)
    hashes = page_hashes(namespace_seed(SPACE), text, 8)
    assert hashes == expected_hashes(SPACE, [text[:8], text[8:16], text[16:]])
    assert hashes == [3928220232059059418, 3774172781825065219, 2576763379013687872]
    other = Namespace(model="m", salt=b"t")
    assert not set(hashes) & set(page_hashes(namespace_seed(other), text, 8))
    assert page_hashes(hashes[0], text[8:], 8) == hashes[1:], "a chain goes on from any page"


def test_an_epoch_begins_with_a_clean_slate() -> None:
    log = EventLog(8, 2, epoch=EPOCH, first_seq=7)
    assert log.dirty
    batch = log.drain(1.5)
    assert batch is not None and batch[0] == 7
    cleared = {"type": "AllBlocksCleared", "epoch": EPOCH.hex()}
    assert decode(batch[1]) == [1.5, [cleared], 0]
    assert not log.dirty and log.drain(2.0) is None
    assert log.next_seq == 8, "nothing told, no number used"


def test_what_follows_on_is_one_event() -> None:
    """A prompt published page by page, one turn: one event, though told in two calls."""
    log = new_log()
    log.stored(SPACE, None, tokens(1), refs(0))
    log.stored(SPACE, 0, tokens(2, 3), refs(4, 2))
    log.stored(SPACE, 0, tokens(9), refs(1))
    log.removed(refs(2))
    log.removed(refs(4, 1))
    hashes = page_hashes(namespace_seed(SPACE), tokens(1, 2, 3), 8)
    first, second, gone = events(log)
    assert first["block_hashes"] == hashes and first["token_ids"] == [1, 1, 2, 2, 3, 3]
    assert first["extra_keys"] == [["s"], None, None] and first["cache_salt"] == "s"
    assert second["parent_block_hash"] == hashes[0] and second["extra_keys"] == [None]
    assert gone == {
        "type": "BlockRemoved",
        "block_hashes": [hashes[2], hashes[1], second["block_hashes"][0]],
        "medium": "GPU",
    }


def test_a_long_prompt_comes_in_portions() -> None:
    log, follower = new_log(), Follower()
    count = 3 * PAGES_A_PORTION + 5
    log.stored(SPACE, None, tokens(*range(count)), refs(*range(count)))
    assert log.num_pending == 4
    sizes = []
    while log.dirty:
        before = len(follower.pages)
        batch = log.drain(1.0)
        assert batch is not None
        follower.apply(batch[1])
        sizes.append(len(follower.pages) - before)
    assert sizes == [PAGES_A_PORTION] * 3 + [5] and not follower.orphans
    assert list(follower.pages) == page_hashes(namespace_seed(SPACE), tokens(*range(count)), 8)
    log.removed(refs(*range(count)))
    while log.dirty:
        assert log.num_pending > 0
        batch = log.drain(1.0)
        assert batch is not None
        follower.apply(batch[1])
    assert not follower.pages and log.table.num_pages == 0


def test_a_flushed_copy_goes_before_its_successor_comes() -> None:
    """The core tells of a flush only as it sweeps. Until then the same content can be published
    again: consumers hear of one copy at a time, and the late news changes nothing."""
    log = new_log()
    log.stored(SPACE, None, tokens(1, 2), refs(0, 1))
    (old,) = events(log)
    log.stored(SPACE, None, tokens(1, 2), refs(5, 6))
    gone, new = events(log)
    assert gone["type"] == "BlockRemoved" and new["type"] == "BlockStored"
    assert gone["block_hashes"] == new["block_hashes"] == old["block_hashes"]
    log.removed(refs(1, 0))
    log.removed(refs(0))
    assert events(log) == []
    log.removed(refs(6))
    assert events(log)[0]["block_hashes"] == old["block_hashes"][1:]
    log.table.check()


def test_a_page_used_again_before_its_removal_is_told() -> None:
    log = new_log()
    log.stored(SPACE, None, tokens(1), refs(3))
    (old,) = events(log)
    log.stored(SPACE, None, tokens(2), refs(3 + GENERATION))
    gone, new = events(log)
    assert gone["block_hashes"] == old["block_hashes"] != new["block_hashes"]
    log.removed(refs(3))  # of the earlier use
    assert events(log) == []
    assert log.table.num_pages == 1


def test_pages_behind_an_unknown_one_are_not_announced() -> None:
    log = new_log()
    log.stored(SPACE, 77, tokens(1, 2), refs(3, 4))
    assert events(log) == [] and log.counts.pages_dropped == 2
    log.removed(refs(3, 4))
    assert events(log) == [] and log.counts.pages_removed == 0


def test_it_wakes_once_until_it_is_drained() -> None:
    log, woken = new_log(), []
    log.wake = lambda: woken.append(log.num_pending)
    log.stored(SPACE, None, tokens(1), refs(0))
    log.removed(refs(0))
    assert woken == [1]
    events(log)
    log.removed(refs(0))
    assert woken == [1, 1]
    log.close()
    log.stored(SPACE, None, tokens(1), refs(0))
    assert woken == [1, 1] and not log.dirty and log.drain(0.0) is None


def replayed(log: EventLog, start: int) -> list[int]:
    """The numbers that an answer has."""
    replay, numbers = answer(log, b"topic", [b"", start.to_bytes(8, "big")]), []
    assert isinstance(replay, Replay)
    while (message := replay.next(0.0)) is not None:
        topic, seq, payload = message
        assert (topic, bool(payload)) == ((b"topic", True) if seq != END else (b"", False))
        numbers.append(int.from_bytes(seq, "big", signed=True))
    assert numbers.pop() == -1
    return numbers


def test_replay_has_what_is_kept_and_no_more() -> None:
    log = new_log(buffer_steps=5)
    for _ in range(12):
        log.heartbeat(0.0)
    assert log.next_seq == 20 and log.first_kept == 15 and len(log.kept) == 5
    assert replayed(log, 0) == replayed(log, 15) == [15, 16, 17, 18, 19]
    assert replayed(log, 18) == [18, 19]
    assert replayed(log, 20) == replayed(log, (1 << 64) - 1) == []


def test_a_replay_under_way_loses_what_is_kept_no_longer() -> None:
    log = new_log(buffer_steps=3)
    for _ in range(3):
        log.heartbeat(0.0)
    replay = Replay(log, b"", 8)
    first = replay.next(0.0)
    assert first is not None and first[1] == (8).to_bytes(8, "big")
    for _ in range(2):
        log.heartbeat(0.0)  # 8 and 9 go; 11 and 12 are behind what was asked for
    second, end, nothing = replay.next(0.0), replay.next(0.0), replay.next(0.0)
    assert second is not None and second[1] == (10).to_bytes(8, "big")
    assert end == [b"", END, b""] and nothing is None


def test_kept_batches_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_KEPT_BYTES", 2000)
    log = new_log()
    for page in range(100):
        log.stored(SPACE, None, tokens(page), refs(page))
        log.drain(0.0)
    assert 1 < len(log.kept) < 20 and sum(map(len, log.kept.values())) <= 2000
    assert list(log.kept) == list(range(log.first_kept, log.next_seq))


@pytest.mark.parametrize(("name", "value"), [("buffer_steps", 0), ("hwm", 0), ("heartbeat_s", -1)])
def test_options_that_no_publisher_can_run_with(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value}: must be at least"):
        EventsOptions(endpoint="ipc:///tmp/x", **{name: value})  # type: ignore[arg-type]
