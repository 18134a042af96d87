"""Answers on the replay socket: many messages for one request, made a few at a time.

Frames here are those behind the receiver's identity and the empty frame.
"""

from __future__ import annotations

from typing import Protocol

from kvd.events import wire
from kvd.events.batch import Batch
from kvd.events.log import PAGES_A_PORTION, EventLog

Message = list[bytes]


class Answer(Protocol):
    """`at_once`: how many messages may be made in one turn of the loop."""

    at_once: int

    def next(self, now: float) -> Message | None:
        """The next message; None behind the last."""

    def close(self) -> None:
        """It will not be asked again."""


class Replay:
    """The batches that are kept, from a sequence number on, as vLLM answers."""

    at_once = 32  # 5 µs each

    def __init__(self, log: EventLog, topic: bytes, start: int) -> None:
        self._log, self._topic = log, topic
        self._next, self._stop = start, log.next_seq
        self._ended = False

    def next(self, now: float) -> Message | None:
        log = self._log
        self._next = max(self._next, log.first_kept)
        if self._next < self._stop:
            seq, self._next = self._next, self._next + 1
            return [self._topic, wire.seq_frame(seq), log.kept[seq]]
        ended, self._ended = self._ended, True
        return None if ended else [b"", wire.END, b""]

    def close(self) -> None:
        self._stop = 0


class Snapshot:
    """All pages that the log has announced, as stored events.

    Later slices are of later states than the first message's sequence number says. With the batches
    behind that number applied, in order and to the end, it comes to the same: what stayed all the
    time is in some slice, and of all else the last batch that names it decides.
    """

    at_once = 1

    def __init__(self, log: EventLog, topic: bytes, pages_a_slice: int = PAGES_A_PORTION) -> None:
        self._log, self._topic, self._pages_a_slice = log, topic, pages_a_slice
        self._cut = log.next_seq - 1
        self._cursor = log.table.walk()
        self._header: bytes | None = wire.snapshot_payload(
            log.epoch, log.first_seq, log.table.num_pages
        )
        self._ended = False

    def next(self, now: float) -> Message | None:
        cut = self._cut.to_bytes(wire.SEQ_BYTES, "big", signed=True)  # -1: before any batch
        if self._header is not None:
            header, self._header = self._header, None
            return [wire.SNAPSHOT, cut, header]
        table = self._log.table
        pages = table.take(self._cursor, self._pages_a_slice)
        if not pages:
            ended, self._ended = self._ended, True
            return None if ended else [b"", wire.END, b""]
        batch = Batch(self._log.page_size, self._log.medium)
        for page, tokens in zip(pages, table.tokens[pages].tolist(), strict=True):
            origin = table.origin[page]
            assert origin is not None
            batch.stored(origin, table.parent[page], [table.hash[page]], tokens)
        return [self._topic, cut, batch.encode(now)]

    def close(self) -> None:
        self._log.table.leave(self._cursor)


class Refusal:
    """The only message to a request that cannot be read."""

    at_once = 1

    def __init__(self, message: str) -> None:
        self._message: str | None = message

    def next(self, now: float) -> Message | None:
        if self._message is None:
            return None
        payload, self._message = wire.error_payload(self._message), None
        return [b"", wire.END, payload]

    def close(self) -> None:
        pass


def answer(log: EventLog, topic: bytes, frames: list[bytes]) -> Answer:
    """Raises BadEventsRequest."""
    start = wire.read_request(frames)
    return Snapshot(log, topic) if start is None else Replay(log, topic, start)
