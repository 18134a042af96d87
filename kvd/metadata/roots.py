"""The namespaces that have a tree: what a page's record names by number."""

from __future__ import annotations

import struct

from kvd.metadata.checksum import Words
from kvd.metadata.failpoints import FAILPOINTS
from kvd.metadata.records import NO_ROOT
from kvd.metadata.table import Table
from kvd_shared.errors import BadRequest
from kvd_shared.namespace import Namespace

ROOT_BYTES = 512
_HEAD = struct.Struct("<QQ")  # id, bytes of the namespace
MAX_NAMESPACE_BYTES = ROOT_BYTES - 8 - _HEAD.size
_SLOT_BITS = 16


class RootTable:
    """A root's id is its slot and, above it, a count that is raised for each root: no id is ever
    that of two, and a record of a root that is gone belongs to none.

    Where there is no room, or a namespace is too long, a root is not recorded (its id is NO_ROOT,
    `num_unrecorded` counts them, but in a table of no size): it is served as any other, and is
    gone after a restart.
    """

    __slots__ = ("_count", "_table", "num_unrecorded")

    def __init__(self, words: Words) -> None:
        self._table = Table("roots", words)
        self._count = 0
        self.num_unrecorded = 0

    def added(self, namespace: Namespace) -> int:
        """A namespace has a tree from now on; returns the root's id."""
        raw = namespace.to_wire()
        slot = self._table.take() if len(raw) <= MAX_NAMESPACE_BYTES else -1
        if slot < 0:
            self.num_unrecorded += len(self._table.words) > 0
            return NO_ROOT
        self._count += 1
        root_id = self._count << _SLOT_BITS | slot
        if FAILPOINTS.armed:
            FAILPOINTS.hit("root_added.before_body")
        seal = self._table.write(slot, _HEAD.pack(root_id, len(raw)) + raw + bytes(-len(raw) % 8))
        if FAILPOINTS.armed:
            FAILPOINTS.hit("root_added.before_seal")
        self._table.seal(slot, seal)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("root_added.done")
        return root_id

    def dead(self, root_id: int) -> None:
        """Nothing under this root can be matched from now on."""
        if root_id == NO_ROOT:
            return
        slot = root_id & ((1 << _SLOT_BITS) - 1)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("root_dead.before_seal")
        self._table.unseal(slot)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("root_dead.done")
        self._table.release(slot)

    def ids(self) -> set[int]:
        """Of the roots that are there."""
        there = self._table.words[:, 0] != 0
        return set(self._table.words[there, 1].tolist())

    def load(self) -> dict[int, Namespace]:
        """The roots that are there, by id. Raises ColdStart."""
        self._count = int(self._table.words[:, 1].max()) >> _SLOT_BITS
        found: dict[int, Namespace] = {}
        for slot in self._table.sealed_slots():
            root_id, length = _HEAD.unpack(self._table.body(slot, _HEAD.size))
            if length > MAX_NAMESPACE_BYTES:
                raise self._table.doubt(slot, f"a namespace of {length} bytes")
            body = self._table.body(slot, _HEAD.size + -(-length // 8) * 8)
            self._table.check_seal(slot, body)
            if root_id & ((1 << _SLOT_BITS) - 1) != slot:
                raise self._table.doubt(slot, f"root {root_id:#x} does not belong there")
            try:
                namespace = Namespace.from_wire(body[_HEAD.size : _HEAD.size + length])
            except BadRequest as e:
                raise self._table.doubt(slot, str(e)) from e
            found[root_id] = namespace
        if len(set(found.values())) != len(found):
            raise self._table.doubt(0, "a namespace has two roots")
        return found
