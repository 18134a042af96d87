"""The bytes: beside a recording of vLLM's own publisher, and requests that are no requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd.events.log import EventLog
from kvd.events.wire import SNAPSHOT, BadEventsRequest, cache_salt, read_request
from kvd_shared.namespace import Namespace
from tests.kvd.events.msgpack_reader import decode

RECORDED = json.loads((Path(__file__).parent / "data" / "vllm-0.33.0.json").read_text())
BASE = Namespace(model="tiny-quote")
TENANT = Namespace(model="tiny-quote", adapter=b"lora", salt=b"tenant-a")
# what the recording publishes, in pages of 4 tokens
FIRST, SECOND = (0, 1, 127, 128), (255, 256, 65535, 65536)
THIRD, OTHER_THIRD, LAST = (9, 10, 11, 151935), (9, 10, 11, 12), (5, 6, 7, 8)


def recorded_batches() -> list[Any]:
    return [decode(bytes.fromhex(payload)) for _, _, payload in RECORDED["live"]]


def tokens(*pages: tuple[int, ...]) -> bytes:
    return np.array(pages, "<i4").tobytes()


def refs(*pages: int) -> bytes:
    return np.array(pages, "<i8").tobytes()


def told_the_same() -> list[Any]:
    """Our batches for the recording's history."""
    log = EventLog(8, 4, epoch=bytes(16))
    batches = [log.drain(1790000000.25)]
    log.stored(BASE, None, tokens(FIRST, SECOND), refs(0, 1))
    batches.append(log.drain(1790000001.25))
    log.stored(BASE, 1, tokens(THIRD), refs(2))
    log.stored(TENANT, None, tokens(FIRST, LAST), refs(3, 4))
    batches.append(log.drain(1790000002.25))
    log.removed(refs(2))
    log.stored(BASE, 1, tokens(OTHER_THIRD), refs(5))
    batches.append(log.drain(1790000003.25))
    log.removed(refs(4, 3))
    batches.append(log.drain(1790000004.25))
    batches.append(log.heartbeat(1790000005.25))
    assert [seq for seq, _ in batches if seq is not None] == list(range(6))  # type: ignore[misc]
    return [decode(batch[1]) for batch in batches if batch is not None]


def with_places_for_hashes(batches: list[Any]) -> list[Any]:
    """Two publishers' batches are alike if they differ in nothing but the names of pages."""
    places: dict[int, int] = {}

    def place(digest: int | None) -> int | None:
        return digest if digest is None else places.setdefault(digest, len(places))

    for _, events, _ in batches:
        for event in events:
            if "block_hashes" in event:
                event["block_hashes"] = [place(digest) for digest in event["block_hashes"]]
            if "parent_block_hash" in event:
                event["parent_block_hash"] = place(event["parent_block_hash"])
    return batches


def test_the_reader_understands_the_recording() -> None:
    first, second, third, *_ = recorded_batches()
    assert first == [1790000000.25, [{"type": "AllBlocksCleared"}], 0]
    assert second[1] == [
        {
            "type": "BlockStored",
            "block_hashes": [0x7A3F000011112222, 0xF23456789ABCDEF0],
            "parent_block_hash": None,
            "token_ids": [*FIRST, *SECOND],
            "block_size": 4,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }
    ]
    assert third[1][1]["extra_keys"] == [["6c6f7261", "tenant-a"], ["6c6f7261"]]


def test_one_history_comes_out_as_from_vllm() -> None:
    ours, recorded = told_the_same(), recorded_batches()
    # what we add, and vLLM's readers skip: the epoch, and SGLang's field for the salt
    assert ours[0][1][0].pop("epoch") == "00" * 16
    assert ours[2][1][1].pop("cache_salt") == "tenant-a"
    assert with_places_for_hashes(ours) == with_places_for_hashes(recorded)
    # fields come in vLLM's order as well, for readers that go by position
    for our_batch, their_batch in zip(ours, recorded, strict=True):
        for our_event, their_event in zip(our_batch[1], their_batch[1], strict=True):
            assert list(our_event) == list(their_event)


def test_a_salt_keeps_its_text_and_no_two_look_alike() -> None:
    salts = [b"tenant-a", b"hex:00", b"\x00", b"\xff", b"hex:ff", "größe".encode()]
    shown = [cache_salt(Namespace(model="m", salt=salt)) for salt in salts]
    assert shown[0] == "tenant-a" and shown[3] == "hex:ff" and shown[5] == "größe"
    assert len(set(shown)) == len(salts)
    assert cache_salt(BASE) is None


def test_requests_of_both_forms() -> None:
    assert read_request([b"", (70_000).to_bytes(8, "big")]) == 70_000
    assert read_request([b"", SNAPSHOT]) is None
    assert len(SNAPSHOT) != 8


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [SNAPSHOT],
        [b"x", SNAPSHOT],
        [b"", b""],
        [b"", b"snapshot!"],
        [b"", bytes(7)],
        [b"", bytes(9)],
        [b"", bytes(8), b""],
        [b"", b"", bytes(8)],
    ],
)
def test_other_requests_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(BadEventsRequest, match="request"):
        read_request(frames)
