"""The lowest weights version of each model whose KV may be matched."""

from __future__ import annotations

import struct

from kvd.metadata.checksum import Words
from kvd.metadata.failpoints import FAILPOINTS
from kvd.metadata.table import Table
from kvd_shared.namespace import MAX_FIELD_BYTES

_HEAD = struct.Struct("<Qq")  # version, bytes of the model's name (ALL: every model)
WEIGHTS_BYTES = 8 + _HEAD.size + MAX_FIELD_BYTES
_ALL = -1


class WeightsTable:
    """Raising a version adds an entry before the older one goes, so at no moment does it fall; the
    highest entry of a model counts. There is always room: kvd.versions bounds the models."""

    __slots__ = ("_slots", "_table")

    def __init__(self, words: Words) -> None:
        self._table = Table("weights versions", words)
        self._slots: dict[str | None, int] = {}

    def raised(self, model: str | None, version: int) -> None:
        """KV of lower versions of the model (None: of every model) is stale from now on."""
        raw = b"" if model is None else model.encode()
        slot = self._table.take()
        assert slot >= 0 and len(raw) <= MAX_FIELD_BYTES
        head = _HEAD.pack(version, _ALL if model is None else len(raw))
        if FAILPOINTS.armed:
            FAILPOINTS.hit("version.before_body")
        seal = self._table.write(slot, head + raw + bytes(-len(raw) % 8))
        if FAILPOINTS.armed:
            FAILPOINTS.hit("version.before_seal")
        self._table.seal(slot, seal)
        old = self._slots.get(model)
        self._slots[model] = slot
        if old is not None:
            if FAILPOINTS.armed:
                FAILPOINTS.hit("version.before_old_seal")
            self._table.unseal(old)
            self._table.release(old)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("version.done")

    def load(self) -> dict[str | None, int]:
        """The versions by model; those that a later one has replaced are taken out. Raises
        ColdStart."""
        found: dict[str | None, int] = {}
        self._slots.clear()
        replaced: list[int] = []
        for slot in self._table.sealed_slots():
            version, length = _HEAD.unpack(self._table.body(slot, _HEAD.size))
            if not _ALL <= length <= MAX_FIELD_BYTES:
                raise self._table.doubt(slot, f"a name of {length} bytes")
            num_bytes = max(length, 0)
            body = self._table.body(slot, _HEAD.size + -(-num_bytes // 8) * 8)
            self._table.check_seal(slot, body)
            raw = body[_HEAD.size : _HEAD.size + num_bytes]
            try:
                model = None if length == _ALL else raw.decode()
            except UnicodeDecodeError as e:
                raise self._table.doubt(slot, str(e)) from e
            if version > found.get(model, -1):
                if model in self._slots:
                    replaced.append(self._slots[model])
                found[model], self._slots[model] = version, slot
            else:
                replaced.append(slot)
        for slot in replaced:
            self._table.unseal(slot)
            self._table.release(slot)
        return found
