"""Messages that no client of ours would send, from a seeded generator."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Any

import msgpack

from kvd.dispatch import FOR_ADMINS
from kvd_shared import verbs
from kvd_shared.rpc import RpcCodec
from tests.integration.mutated_frames import good_calls, mutated

REMEMBERED = 256  # messages to be sent again
KILLERS = {"kill_session", "end_session"}  # these would end the fuzzer's own process or sessions
# msgpack heads of a str, a bin, an array and a map of 2**31 - 1 and 2**32 - 1 items
HUGE = [head + size for head in (b"\xdb", b"\xc6", b"\xdd", b"\xdf")
        for size in (b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff")]  # fmt: skip
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63), 0.0, 1e300),
    *(float("nan"), float("inf"), "", "x" * 70, "\x00", "\u202e", b"", bytes(8), bytes(16)),
    *(bytes(4096), [], [[]], [None] * 50, {}, {"v": 1}, {1: 2}, {"": {"": {}}}),
]


class Messages:
    """Faulty messages under given tokens. `held` and `handles` are what the live session has."""

    def __init__(self, rng: Random) -> None:
        self.held: list[int] = [5, 6, 7]
        self.handles: list[int] = [1]
        self.request = 1
        self._rng = rng
        self._sent: deque[list[bytes]] = deque(maxlen=REMEMBERED)

    def nobodys(self, tokens: Sequence[bytes]) -> list[bytes]:
        """One that must be refused whatever it says, for its token is nobody's that may use it."""
        return self._message(self._rng.choice(tokens), admins=False)

    def live(self, worker: RpcCodec, admin: RpcCodec) -> list[bytes]:
        """One under a living session; some of them are right by chance."""
        rng = self._rng
        if self._sent and rng.random() < 0.05:
            return list(rng.choice(self._sent))
        call = self._call()
        while call.op in KILLERS:
            call = self._call()
        deadline_ms = int(time.monotonic() * 1000) + 5_000 if rng.random() < 0.5 else 0
        _, frames = (admin if call.op in FOR_ADMINS else worker).request(call, deadline_ms)
        frames = self._faulty(frames) if rng.random() < 0.93 else frames
        self._sent.append(frames)
        return frames

    def declaring(self, codec: RpcCodec, others: Sequence[int]) -> list[bytes]:
        """A declaration of what it holds and does not hold, whole or faulty, or something else that
        comes too early."""
        rng = self._rng
        if self._sent and rng.random() < 0.2:  # also of the epoch before
            return list(rng.choice(self._sent))
        known = list({*self.held, *others})
        refs = rng.sample(known, rng.randrange(len(known) + 1))
        counts = [rng.choice([1, 1, 2, 3, 0, -1, 2**31 - 1]) if rng.random() < 0.2 else 1
                  for _ in refs]  # fmt: skip
        call: verbs.Call[Any] = verbs.declare(refs, counts, rng.random() < 0.02)
        if rng.random() < 0.2:
            call = self._call()
        _, frames = codec.request(call)
        return self._faulty(frames) if rng.random() < 0.6 else frames

    def _message(self, token: bytes, admins: bool) -> list[bytes]:
        _, frames = RpcCodec(token).request(self._call())
        return self._faulty(frames) if self._rng.random() < 0.8 else frames

    def _call(self) -> verbs.Call[Any]:
        return self._rng.choice(good_calls(self._rng, self.held, self.request, None, self.handles))

    def _faulty(self, frames: list[bytes]) -> list[bytes]:
        match self._rng.randrange(6):
            case 0:
                return [self._confused(frames[0]), *frames[1:]]
            case 1:
                return self._huge(frames)
            case 2:
                return [self._renumbered(frames[0]), *frames[1:]]
            case _:
                return mutated(self._rng, frames)

    def _confused(self, raw: bytes) -> bytes:
        """One field, at any depth, has another value or another type, or is missing, or new."""
        rng = self._rng
        header = msgpack.unpackb(raw, strict_map_key=False)
        place = header
        while rng.random() < 0.7:
            inner = [v for v in _values(place) if isinstance(v, dict | list) and v]
            if not inner:
                break
            place = rng.choice(inner)
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return raw
        match rng.randrange(6):
            case 0 if isinstance(place, dict):
                del place[rng.choice(keys)]
            case 1 if isinstance(place, dict):
                place[rng.choice(["epoch", "deadline_ms", "", "op", "seq"])] = rng.choice(ODD)
            case 2:
                place[rng.choice(keys)] = rng.choice(list(_values(place)))
            case _:
                place[rng.choice(keys)] = rng.choice(ODD)
        packed: bytes = msgpack.packb(header)
        return packed

    def _renumbered(self, raw: bytes) -> bytes:
        """Another epoch, another number, another deadline: each of the right type."""
        rng = self._rng
        header = msgpack.unpackb(raw, strict_map_key=False)
        epoch, seq, now_ms = header["epoch"], header["seq"], int(time.monotonic() * 1000)
        match rng.randrange(3):
            case 0:
                header["epoch"] = rng.choice([epoch - 1, epoch + 1, 0, 1, 2**32, 2**63])
            case 1:  # mostly one that was used before
                ahead = rng.random() < 0.03
                header["seq"] = seq + rng.randrange(200) if ahead else max(
                    0, seq - rng.randrange(300)
                )  # fmt: skip
            case _:
                header["deadline_ms"] = rng.choice([1, now_ms - 1, now_ms, now_ms + 5000, 2**63])
        packed: bytes = msgpack.packb(header)
        return packed

    def _huge(self, frames: list[bytes]) -> list[bytes]:
        """Lengths that lie, counts that cannot be met."""
        rng, raw = self._rng, bytearray(frames[0])
        at = rng.randrange(len(raw) + 1)
        raw[at : at + rng.randrange(6)] = rng.choice(HUGE)
        return [bytes(raw), *frames[1:]]


def _values(place: Any) -> Any:
    return place.values() if isinstance(place, dict) else place
