"""What an operation is to a client: its name, its arguments, and the reading of its reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from kvd_shared.errors import KvdError, error_from_wire
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES, PageRefs, TokenIds, refs_from_bytes
from kvd_shared.wire import Frames, FrameWriter, read_array

T = TypeVar("T")
Result = dict[str, Any]


class Call(Generic[T]):
    """One operation: its name, its arguments (arrays as bytes), and the reading of its result."""

    def __init__(self, op: str, args: dict[str, Any], read: Callable[[Result, Frames], T]) -> None:
        self.op = op
        self.args = args
        self.read = read

    def to_wire(self, writer: FrameWriter) -> dict[str, Any]:
        return {"op": self.op, "args": arrays_out(self.args, writer)}


class StepCall(Call[list[Any]]):
    def to_wire(self, writer: FrameWriter) -> dict[str, Any]:
        calls = [call.to_wire(writer) for call in self.args["calls"]]
        return {"op": self.op, "args": {"calls": calls}}


def arrays_out(fields: dict[str, Any], writer: FrameWriter) -> dict[str, Any]:
    """A map with its arrays (bytes) put inline or into raw frames."""
    return {k: writer.array(v) if type(v) is bytes else v for k, v in fields.items()}


def prompt(namespace: Namespace, tokens: npt.ArrayLike) -> dict[str, Any]:
    return {"namespace": namespace.to_wire(), "tokens": token_bytes(tokens)}


def token_bytes(tokens: npt.ArrayLike) -> bytes:
    ids: TokenIds = np.asarray(tokens, dtype="<i4")
    return ids.tobytes()


def ref_bytes(refs: npt.ArrayLike) -> bytes:
    return np.asarray(refs, dtype="<i8").tobytes()


def read_refs(result: Result, frames: Frames, name: str = "refs") -> PageRefs:
    return refs_from_bytes(read_array(result[name], frames, REF_BYTES, name))


def read_counts(result: Result, frames: Frames, name: str) -> npt.NDArray[np.int32]:
    raw = read_array(result[name], frames, TOKEN_BYTES, name)
    return np.frombuffer(raw, dtype="<i4").astype(np.int32, copy=False)


def read_nothing(_: Result, __: Frames) -> None:
    return None


def read_map(r: Result, _: Frames) -> Result:
    return r


def read_one(call: Call[Any], reply: dict[str, Any], frames: Frames) -> Any:
    if "error" in reply:
        return error_from_wire(reply["error"])
    result: Any = call.read(reply["result"], frames)
    assert not isinstance(result, KvdError)
    return result
