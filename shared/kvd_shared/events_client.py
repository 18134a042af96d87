"""Follow one pool's KV events from anywhere: snapshot, stream and replay of docs/events.md.

pages: dict[int, int | None] = {}                   # hash -> the one that it continues
with EventsClient("tcp://host:5557", "tcp://host:5558") as client:
    while True:
        for event in client.poll(timeout_s=1.0):
            match event["type"]:
                case "AllBlocksCleared": pages.clear()
                case "BlockStored": pages.update(chain(event))
                case "BlockRemoved": [pages.pop(block, None) for block in event["block_hashes"]]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgpack
import zmq

Event = dict[str, Any]
SNAPSHOT = b"kvd.snapshot"
END = b"\xff" * 8


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """40 characters each (Z85): the publisher's public key, and the client's own pair."""

    server_public: bytes
    public: bytes
    secret: bytes = field(repr=False)

    def use(self, socket: zmq.Socket[bytes]) -> None:
        """Before it connects."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)


class EventsClient:
    """Each event is a state of the pages that it names: apply them in order, the same one twice if
    it comes twice, and the whole is the cache's state. Whenever what was missed is not kept any
    more, AllBlocksCleared comes and everything anew. For one thread.

    Invariant: everything up to number `seq` has been returned by `poll`; None: nothing yet.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str,
        topic: bytes = b"",
        answer_timeout_s: float = 5.0,
        keys: CurveKeys | None = None,
    ) -> None:
        """`keys`: for endpoints that have them; with wrong ones nothing ever comes."""
        self.seq: int | None = None
        self.epoch = ""  # the publisher's, in hexadecimal
        self._answer_timeout_ms = int(answer_timeout_s * 1000)
        self._replay_endpoint = replay_endpoint
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.SUB)
        self._live.setsockopt(zmq.RCVHWM, 0)  # what waits here need not be asked for
        self._keys = keys
        if keys is not None:
            keys.use(self._live)
        self._live.subscribe(topic)
        self._live.connect(endpoint)

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; waits for something up to so long.

        Raises TimeoutError when the replay endpoint does not answer; call again then.
        """
        if self.seq is None:
            return self._join()
        if not self._live.poll(int(timeout_s * 1000)):
            return []
        _, number, payload = self._live.recv_multipart()
        seq = int.from_bytes(number, "big")
        if seq <= self.seq:
            return []
        if seq == self.seq + 1:
            return self._events(seq, payload)
        return self._catch_up()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> EventsClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _events(self, seq: int, payload: bytes) -> list[Event]:
        events: list[Event] = msgpack.unpackb(payload)[1]
        if events and events[0]["type"] == "AllBlocksCleared":
            self.epoch = events[0]["epoch"]
        self.seq = seq
        return events

    def _catch_up(self) -> list[Event]:
        assert self.seq is not None
        events: list[Event] = []
        for _, number, payload in self._ask((self.seq + 1).to_bytes(8, "big")):
            seq, epoch = int.from_bytes(number, "big"), self.epoch
            gap = seq != self.seq + 1
            batch = self._events(seq, payload)
            if gap and self.epoch == epoch:  # neither the next one nor a new beginning
                return self._join()
            events += batch
        return events

    def _join(self) -> list[Event]:
        self.seq = None
        (_, cut, header), *slices = self._ask(SNAPSHOT)
        self.epoch = msgpack.unpackb(header)["epoch"]
        events: list[Event] = [{"type": "AllBlocksCleared", "epoch": self.epoch}]
        for _, _, payload in slices:
            events += msgpack.unpackb(payload)[1]
        self.seq = int.from_bytes(cut, "big", signed=True)
        return events

    def _ask(self, request: bytes) -> list[list[bytes]]:
        """All messages of the answer but the last."""
        messages: list[list[bytes]] = []
        with self._context.socket(zmq.DEALER) as replay:  # a new one knows of no older answer
            replay.setsockopt(zmq.LINGER, 0)
            if self._keys is not None:
                self._keys.use(replay)
            replay.connect(self._replay_endpoint)
            replay.send_multipart([b"", request])
            while replay.poll(self._answer_timeout_ms):
                _, *message = replay.recv_multipart()
                if message[1] != END:
                    messages.append(message)
                elif message[2]:
                    raise TimeoutError(msgpack.unpackb(message[2])["error"])
                else:
                    return messages
        raise TimeoutError(
            f"{self._replay_endpoint} has sent nothing for {self._answer_timeout_ms} ms: is kvd up?"
        )
