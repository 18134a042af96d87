"""The arguments of one operation, read strictly: a missing, foreign or wrong one is BAD_REQUEST."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvd_shared.errors import BadRequest, OverLimit, TooLarge, brief
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES
from kvd_shared.wire import Frames, read_array

MAX_ARRAY_BYTES = 32 << 20  # of one request


class Room:
    """How many bytes of arrays a request may still name. All calls of a step share one: they could
    name one long frame thousands of times, and each time it is work.

    Invariant: `left` is never negative.
    """

    def __init__(self) -> None:
        self.left = MAX_ARRAY_BYTES

    def take(self, op: str, num_bytes: int) -> None:
        """Raises TooLarge, and takes nothing then."""
        if num_bytes > self.left:
            raise TooLarge(
                f"{op}: {num_bytes} bytes of arrays, and the request has {self.left} of its "
                f"{MAX_ARRAY_BYTES} left (a frame counts as often as it is named): split it",
                size=num_bytes,
                limit=MAX_ARRAY_BYTES,
            )
        self.left -= num_bytes


class Arguments:
    """Reads each argument once; `done` refuses those that nobody read."""

    def __init__(self, op: str, args: Any, frames: Frames, room: Room | None = None) -> None:
        if not isinstance(args, dict):
            raise BadRequest(f"{op}: args must be a map, not {type(args).__name__}")
        self._op, self._args, self._frames = op, dict(args), frames
        self.room = Room() if room is None else room

    def take(self, name: str) -> Any:
        if name not in self._args:
            raise BadRequest(f"{self._op}: argument {name!r} is missing")
        return self._args.pop(name)

    def done(self) -> None:
        if self._args:
            raise BadRequest(f"{self._op}: unknown argument {brief(min(map(str, self._args)))}")

    def number(self, name: str) -> int:
        value = self.take(name)
        if type(value) is not int:
            raise BadRequest(f"{self._op}: {name} = {brief(value)} must be a whole number")
        return value

    def optional_number(self, name: str) -> int | None:
        """nil, or absent, is None; so are all the optional ones."""
        value = self._args.pop(name, None)
        if value is not None and type(value) is not int:
            raise BadRequest(f"{self._op}: {name} = {brief(value)} must be a whole number or nil")
        return value

    def optional_string(self, name: str) -> str | None:
        value = self._args.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise BadRequest(f"{self._op}: {name} = {brief(value)} must be a string or nil")
        return value

    def optional_bytes(self, name: str) -> bytes | None:
        value = self._args.pop(name, None)
        if value is not None and type(value) is not bytes:
            raise BadRequest(f"{self._op}: {name} must be bytes or nil")
        return value

    def optional_map(self, name: str) -> dict[str, Any] | None:
        value = self._args.pop(name, None)
        if value is not None and not isinstance(value, dict):
            raise BadRequest(f"{self._op}: {name} must be a map or nil")
        return value

    def seconds(self, name: str) -> float:
        value = self.take(name)
        if type(value) not in (int, float):
            raise BadRequest(f"{self._op}: {name} = {brief(value)} must be a number of seconds")
        return float(value)

    def positive(self, name: str) -> float:
        """Seconds, or a rate."""
        value = self.take(name)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise BadRequest(f"{self._op}: {name} = {brief(value)} must be above 0")
        return float(value)

    def optional_positive(self, name: str) -> float | None:
        if self._args.get(name) is None:
            self._args.pop(name, None)
            return None
        return self.positive(name)

    def flag(self, name: str) -> bool:
        """Absent is false."""
        value = self._args.pop(name, False)
        if type(value) is not bool:
            raise BadRequest(f"{self._op}: {name} = {brief(value)} must be true or false")
        return value

    def numbers_or_nil(self, name: str, most: int) -> list[int | None]:
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most:
            raise BadRequest(f"{self._op}: {name} must be a list of at most {most}")
        for one in value:
            if one is not None and type(one) is not int:
                raise BadRequest(f"{self._op}: {name}: {brief(one)} must be a whole number or nil")
        return value

    def ref(self, name: str) -> int:
        value = self.number(name)
        if not 0 <= value < 1 << 63:
            raise BadRequest(f"{self._op}: {name} = {value} is no page reference")
        return value

    def optional_ref(self, name: str) -> int | None:
        if self._args.get(name) is None:
            self._args.pop(name, None)
            return None
        return self.ref(name)

    def namespace(self) -> Namespace:
        return Namespace.from_wire(self.take("namespace"))

    def tokens(self, vocab_size: int, most: int | None) -> bytes:
        """Token ids, int32, each from 0 to below the vocabulary's size; `most` of them (None: no
        limit). Raises OverLimit before it looks at them.
        """
        raw = self.array("tokens", TOKEN_BYTES)
        count = len(raw) // TOKEN_BYTES
        if most is not None and count > most:
            raise OverLimit(
                f"{self._op}: {count} tokens; the limit is {most} (limits.max_prompt_tokens)",
                limit="max_prompt_tokens",
                value=count,
                most=most,
            )
        if raw:
            # seen as unsigned, negative ids are above all others: one pass finds both
            highest = int(np.frombuffer(raw, dtype="<u4").max())
            if highest >= vocab_size:
                ids = np.frombuffer(raw, dtype="<i4")
                at = int(np.flatnonzero(ids.view("<u4") >= vocab_size)[0])
                raise BadRequest(
                    f"{self._op}: token {at} has the id {int(ids[at])}: must be from 0 to "
                    f"{vocab_size - 1}"
                )
        return raw

    def refs(self) -> bytes:
        return self.array("refs", REF_BYTES)

    def array(self, name: str, item_bytes: int) -> bytes:
        raw = read_array(self.take(name), self._frames, item_bytes, name)
        self.room.take(self._op, len(raw))
        return raw

    def charge(self, num_bytes: int) -> None:
        """Work that is as much as reading so many bytes more. Raises TooLarge."""
        self.room.take(self._op, num_bytes)
