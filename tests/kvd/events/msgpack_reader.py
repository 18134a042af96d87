"""MessagePack, read from its specification alone, so that no encoder is tested against itself."""

from __future__ import annotations

import struct
from typing import Any

# type byte -> (struct format of the number behind it)
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# type byte -> (bytes of the length behind it, kind)
_SIZED = {
    0xC4: (1, "bin"), 0xC5: (2, "bin"), 0xC6: (4, "bin"),
    0xD9: (1, "str"), 0xDA: (2, "str"), 0xDB: (4, "str"),
    0xDC: (2, "array"), 0xDD: (4, "array"), 0xDE: (2, "map"), 0xDF: (4, "map"),
}  # fmt: skip


def decode(raw: bytes) -> Any:
    """One value, which is all there is."""
    value, end = _value(raw, 0)
    assert end == len(raw), f"{len(raw) - end} bytes behind the value"
    return value


def _value(raw: bytes, at: int) -> tuple[Any, int]:
    kind, at = raw[at], at + 1
    if kind < 0x80:
        return kind, at
    if kind >= 0xE0:
        return kind - 0x100, at
    if kind in _CONSTANTS:
        return _CONSTANTS[kind], at
    if kind in _NUMBERS:
        size = struct.calcsize(_NUMBERS[kind])
        return struct.unpack(_NUMBERS[kind], raw[at : at + size])[0], at + size
    if kind < 0x90:
        return _sized("map", kind & 0x0F, raw, at)
    if kind < 0xA0:
        return _sized("array", kind & 0x0F, raw, at)
    if kind < 0xC0:
        return _sized("str", kind & 0x1F, raw, at)
    width, name = _SIZED[kind]
    return _sized(name, int.from_bytes(raw[at : at + width], "big"), raw, at + width)


def _sized(kind: str, count: int, raw: bytes, at: int) -> tuple[Any, int]:
    if kind in ("str", "bin"):
        piece = raw[at : at + count]
        assert len(piece) == count, "cut short"
        return piece.decode() if kind == "str" else piece, at + count
    items: list[Any] = []
    for _ in range(count * (2 if kind == "map" else 1)):
        item, at = _value(raw, at)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items), at
