"""Frames of the RPC channel, as docs/protocol.md describes them. No sockets here.

A message is a msgpack map (the header) followed by raw frames. A field that holds an array (token
ids as int32, page references as int64, both little-endian) is either inline bytes or the number of
the raw frame that holds it, counting from 1; long ones travel as raw frames, uncopied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from kvd_shared.errors import (
    BadRequest,
    KvdError,
    ProtocolMismatch,
    TooLarge,
    brief,
    error_to_wire,
)

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 32 << 20  # 8M token ids
MAX_ATTACH_BYTES = 64 << 10  # one packet on the lease socket
INLINE_BYTES = 4096
TOKEN_LENGTH = 16  # bytes of a session token

Frames = Sequence[bytes]


class FrameWriter:
    """Collects the raw frames of one message while its header is built.

    Invariant: the short arrays in the header have at most as many bytes as it was given at first.
    """

    def __init__(self, most_inline: int = MAX_FRAME_BYTES) -> None:
        """`most_inline`: bytes of short arrays that the header may have; others go into frames. A
        reply must not become too large: what it tells of has been done."""
        self.frames: list[bytes] = []
        self._room = most_inline

    def array(self, raw: bytes) -> bytes | int:
        """What the header holds in place of `raw`."""
        if len(raw) < INLINE_BYTES and len(raw) <= self._room:
            self._room -= len(raw)
            return raw
        if len(raw) > MAX_FRAME_BYTES:
            raise TooLarge(
                f"an array of {len(raw)} bytes is over the limit of {MAX_FRAME_BYTES} bytes a "
                "frame: send fewer tokens",
                size=len(raw),
                limit=MAX_FRAME_BYTES,
            )
        self.frames.append(raw)
        return len(self.frames)

    def message(self, header: dict[str, Any]) -> list[bytes]:
        head = msgpack.packb(header)
        if len(head) > MAX_FRAME_BYTES:
            raise TooLarge(
                f"a header of {len(head)} bytes is over the limit of {MAX_FRAME_BYTES} bytes: "
                "send fewer operations a step",
                size=len(head),
                limit=MAX_FRAME_BYTES,
            )
        return [head, *self.frames]


def read_array(value: Any, frames: Frames, item_bytes: int, name: str) -> bytes:
    """The bytes of an array field. Raises BadRequest when it is absent, cut or misnumbered."""
    if type(value) is int:
        if not 1 <= value < len(frames):
            raise BadRequest(f"{name} names raw frame {value}, the message has {len(frames) - 1}")
        value = frames[value]
    if type(value) is not bytes:
        raise BadRequest(f"{name} must be bytes or a frame number, not {type(value).__name__}")
    if len(value) % item_bytes:
        raise BadRequest(f"{name} has {len(value)} bytes, no multiple of {item_bytes}")
    return value


def read_header(frames: Frames) -> dict[str, Any]:
    """The header map of a message. Raises BadRequest or ProtocolMismatch."""
    return read_map(frames[0] if frames else b"")


def read_map(raw: bytes) -> dict[str, Any]:
    """A msgpack map of this protocol's version, as headers and lease packets are."""
    try:
        header = msgpack.unpackb(raw, raw=False, strict_map_key=True)
    except Exception as e:  # msgpack raises a dozen kinds on foreign bytes; all mean the same
        raise BadRequest(f"not a msgpack map: {type(e).__name__}: {e}") from e
    if not isinstance(header, dict):
        raise BadRequest(f"not a msgpack map but {type(header).__name__}")
    version = header.get("v")
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"protocol version {brief(version)}; this side speaks {PROTOCOL_VERSION}: "
            "use a kvd and a client of the same release",
            theirs=version if type(version) is int else None,
            ours=PROTOCOL_VERSION,
        )
    return header


def error_reply(epoch: int, seq: int, error: KvdError) -> list[bytes]:
    header = {"v": PROTOCOL_VERSION, "epoch": epoch, "seq": seq, "error": error_to_wire(error)}
    return [msgpack.packb(header)]
