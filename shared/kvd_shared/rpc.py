"""The client's side of the RPC channel without its socket: numbering, encoding, decoding."""

from __future__ import annotations

from typing import Any, TypeVar

from kvd_shared.calls import Call
from kvd_shared.errors import BadRequest, KvdError, error_from_wire
from kvd_shared.wire import PROTOCOL_VERSION, Frames, FrameWriter, read_header

T = TypeVar("T")


class Notice:
    """What the daemon says unasked. `yield`: the named sequence is asked to give its pages back
    and queue again. To a request that waits for what another computes: `progress`, its first
    `tokens` are cached now; `ready`, all that it waits for is; `ended`, no more will come."""

    __slots__ = ("kind", "request", "tokens")

    def __init__(self, kind: str, request: int, tokens: int = 0) -> None:
        self.kind = kind
        self.request = request
        self.tokens = tokens

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Notice):
            return NotImplemented
        mine = (self.kind, self.request, self.tokens)
        return mine == (other.kind, other.request, other.tokens)

    def __hash__(self) -> int:
        return hash((self.kind, self.request, self.tokens))

    def __repr__(self) -> str:
        return f"Notice({self.kind!r}, {self.request}, {self.tokens})"


class Reply:
    """An answer to call number `seq`, or to none of ours (0) when the frames made no sense."""

    __slots__ = ("frames", "header", "seq")

    def __init__(self, seq: int, header: dict[str, Any], frames: Frames) -> None:
        self.seq = seq
        self.header = header
        self.frames = frames


class RpcCodec:
    """Numbers and encodes calls, decodes what comes back. A number is used for one request only,
    for as long as the session lives, in all its epochs."""

    def __init__(self, token: bytes, epoch: int = 1) -> None:
        self.epoch = epoch
        self._token = token
        self._seq = 0

    def request(
        self, call: Call[Any], deadline_ms: int = 0, seq: int | None = None
    ) -> tuple[int, list[bytes]]:
        """The call's number and its frames. Raises TooLarge before anything is sent.

        `deadline_ms`: CLOCK_MONOTONIC; behind it the request is not to be begun; 0: none. `seq`: of
        this very request, which is sent once more.
        """
        writer = FrameWriter()
        number = self._seq + 1 if seq is None else seq
        header = {
            "v": PROTOCOL_VERSION,
            "epoch": self.epoch,
            "session": self._token,
            "seq": number,
            "deadline_ms": deadline_ms,
            **call.to_wire(writer),
        }
        frames = writer.message(header)
        if seq is None:
            self._seq = number
        return number, frames

    def incoming(self, frames: Frames) -> Reply | Notice:
        """What a message from the daemon is. Raises BadRequest if it is neither."""
        header = read_header(frames)
        if "notice" in header:
            return Notice(header["notice"], header["request"], header.get("tokens", 0))
        if "seq" not in header:
            raise BadRequest("the daemon's message is neither a reply nor a notice")
        return Reply(header["seq"], header, frames)


def read_reply(call: Call[T], reply: Reply) -> T:
    """The result of a call, or raises the error that the daemon answered."""
    if "error" in reply.header:
        raise error_from_wire(reply.header["error"])
    result = call.read(reply.header["result"], reply.frames)
    assert not isinstance(result, KvdError)
    return result
