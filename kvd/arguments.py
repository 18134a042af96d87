"""The arguments of one operation, read strictly: a missing, foreign or wrong one is BAD_REQUEST."""

from __future__ import annotations

from typing import Any

from kvd_shared.errors import BadRequest, brief
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES
from kvd_shared.wire import Frames, read_array


class Arguments:
    """Reads each argument once; `done` refuses those that nobody read."""

    def __init__(self, op: str, args: Any, frames: Frames) -> None:
        if not isinstance(args, dict):
            raise BadRequest(f"{op}: args must be a map, not {type(args).__name__}")
        self._op, self._args, self._frames = op, dict(args), frames

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
        value = self.take(name)
        if value is not None and type(value) is not int:
            raise BadRequest(f"{self._op}: {name} = {brief(value)} must be a whole number or nil")
        return value

    def optional_string(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise BadRequest(f"{self._op}: {name} = {brief(value)} must be a string or nil")
        return value

    def optional_ref(self, name: str) -> int | None:
        value = self.optional_number(name)
        if value is not None and not 0 <= value < 1 << 63:
            raise BadRequest(f"{self._op}: {name} = {value} is no page reference")
        return value

    def namespace(self) -> Namespace:
        return Namespace.from_wire(self.take("namespace"))

    def tokens(self) -> bytes:
        return read_array(self.take("tokens"), self._frames, TOKEN_BYTES, "tokens")

    def refs(self) -> bytes:
        return read_array(self.take("refs"), self._frames, REF_BYTES, "refs")
