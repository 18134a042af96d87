"""A table of fixed entries, each of which is there from one store on and gone with another.

The first word of an entry is its seal: the checksum of the rest while it is there, else 0. So a
half-written entry is none, and no stray write makes one.
"""

from __future__ import annotations

import numpy as np

from kvd.metadata.checksum import Checksum, Words
from kvd.metadata.cold import ColdStart


class Table:
    """Invariant: `free` and the slots from `next_slot` on are those of entries that are gone."""

    __slots__ = ("_checksums", "entry_words", "free", "memory", "name", "next_slot", "words")

    def __init__(self, name: str, words: Words) -> None:
        """`words`: one row an entry."""
        self.name = name
        self.words = words
        self.entry_words = words.shape[1]
        self.memory = words.reshape(-1).view(np.uint8).data  # also of a table of no entries
        self.free: list[int] = []
        self.next_slot = 0
        self._checksums: dict[int, Checksum] = {}

    @property
    def num_free(self) -> int:
        return len(self.free) + len(self.words) - self.next_slot

    def take(self) -> int:
        """The slot of an entry to be; -1: the table is full."""
        if self.free:
            return self.free.pop()
        if self.next_slot == len(self.words):
            return -1
        self.next_slot += 1
        return self.next_slot - 1

    def write(self, slot: int, body: bytes, first: int = 1) -> int:
        """Store what is to be sealed, from word `first` on; returns its seal."""
        at = (slot * self.entry_words + first) * 8
        self.memory[at : at + len(body)] = body
        return self._seal_of(body)

    def seal(self, slot: int, seal: int) -> None:
        self.words[slot, 0] = seal

    def unseal(self, slot: int) -> None:
        self.words[slot, 0] = 0

    def release(self, slot: int) -> None:
        """The slot can be another entry's; it has no seal."""
        self.free.append(slot)

    def body(self, slot: int, num_bytes: int, first: int = 1) -> bytes:
        at = (slot * self.entry_words + first) * 8
        return bytes(self.memory[at : at + num_bytes])

    def sealed_slots(self) -> list[int]:
        """The slots of entries that are there; all others can be taken from now on."""
        found: list[int] = np.flatnonzero(self.words[:, 0]).tolist()
        self.next_slot = found[-1] + 1 if found else 0
        self.free = sorted(set(range(self.next_slot)) - set(found), reverse=True)
        return found

    def check_seal(self, slot: int, body: bytes) -> None:
        """Raises ColdStart."""
        if len(body) % 8 or int(self.words[slot, 0]) != self._seal_of(body):
            raise self.doubt(slot, "its checksum does not fit")

    def doubt(self, slot: int, why: str) -> ColdStart:
        return ColdStart(self.name, f"entry {slot} of the table of {self.name}: {why}")

    def _seal_of(self, body: bytes) -> int:
        words = len(body) // 8
        checksum = self._checksums.get(words)
        if checksum is None:
            checksum = self._checksums[words] = Checksum(words)
        return checksum.one(body) or 1
