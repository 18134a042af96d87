"""Frames on the two sockets of KV events, as docs/events.md describes them. No sockets here."""

from __future__ import annotations

from collections.abc import Sequence

import msgpack

from kvd_shared.namespace import Namespace

SEQ_BYTES = 8
END = (-1).to_bytes(SEQ_BYTES, "big", signed=True)  # in an answer's last message
SNAPSHOT = b"kvd.snapshot"  # not of a sequence number's size, so none can be taken for it
MAX_REQUEST_BYTES = 64


class BadEventsRequest(ValueError):
    """A message on the replay socket that is in neither of the two forms."""


def seq_frame(seq: int) -> bytes:
    return seq.to_bytes(SEQ_BYTES, "big")


def read_request(frames: Sequence[bytes]) -> int | None:
    """The sequence number from which to replay, or None for a snapshot. Raises BadEventsRequest.

    `frames` are those behind the sender's identity: an empty one and the request.
    """
    if len(frames) != 2 or frames[0]:
        raise BadEventsRequest(
            f"a request is an empty frame and one more (a REQ socket sends the empty one by "
            f"itself); this one's frames have {[len(frame) for frame in frames]} bytes"
        )
    if frames[1] == SNAPSHOT:
        return None
    if len(frames[1]) != SEQ_BYTES:
        raise BadEventsRequest(
            f"a request of {len(frames[1])} bytes: send a sequence number in {SEQ_BYTES}, "
            f"big-endian, or {SNAPSHOT.decode()!r}"
        )
    return int.from_bytes(frames[1], "big")


def error_payload(message: str) -> bytes:
    return msgpack.packb({"error": message})


def snapshot_payload(epoch: bytes, first_seq: int, num_pages: int) -> bytes:
    """What the first message of a snapshot says."""
    return msgpack.packb({"epoch": epoch.hex(), "first_seq": first_seq, "num_blocks": num_pages})


def lora_name(namespace: Namespace) -> str | None:
    return namespace.adapter.hex() or None


def cache_salt(namespace: Namespace) -> str | None:
    """A salt that is text stays as it is: a router compares it with the salt of a request. Others
    are shown in hexadecimal, marked, so that no two salts look alike."""
    try:
        text = namespace.salt.decode()
    except UnicodeDecodeError:
        return "hex:" + namespace.salt.hex()
    return "hex:" + namespace.salt.hex() if text.startswith("hex:") else text or None
