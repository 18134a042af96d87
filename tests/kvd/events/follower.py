"""A router's view of one pool, kept from the events alone; written from docs/events.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from kvd_shared.namespace import Namespace
from tests.kvd.events.msgpack_reader import decode


@dataclass(slots=True)
class Follower:
    """`pages`: hash -> (parent's hash, token ids). It is strict: what is stored twice,
    or removed twice, is wrong."""

    pages: dict[int, tuple[int | None, tuple[int, ...]]] = field(default_factory=dict)
    epoch: str | None = None
    orphans: int = 0  # pages stored behind an unknown one

    def apply(self, payload: bytes) -> None:
        time_s, events, rank = decode(payload)
        assert type(time_s) is float and rank == 0
        for event in events:
            getattr(self, "_" + event["type"])(event)

    def _AllBlocksCleared(self, event: dict[str, Any]) -> None:
        self.pages.clear()
        self.epoch = event["epoch"]

    def _BlockStored(self, event: dict[str, Any]) -> None:
        hashes, size, tokens = event["block_hashes"], event["block_size"], event["token_ids"]
        assert len(hashes) * size == len(tokens), "not dense"
        parent = event["parent_block_hash"]
        self.orphans += parent is not None and parent not in self.pages
        for i, digest in enumerate(hashes):
            assert 0 < digest < 1 << 63
            self._check_new(digest)
            self.pages[digest] = (parent, tuple(tokens[i * size : (i + 1) * size]))
            parent = digest

    def _BlockRemoved(self, event: dict[str, Any]) -> None:
        for digest in event["block_hashes"]:
            del self.pages[digest]  # it was stored, and not removed twice

    def _check_new(self, digest: int) -> None:
        assert digest not in self.pages, "stored twice"


@dataclass(slots=True)
class Latecomer(Follower):
    """One that applies a snapshot first: a state on the way, in which what comes is known or gone
    already."""

    def _BlockRemoved(self, event: dict[str, Any]) -> None:
        for digest in event["block_hashes"]:
            self.pages.pop(digest, None)

    def _check_new(self, digest: int) -> None:
        pass


def expected_hashes(namespace: Namespace, pages: list[bytes]) -> list[int]:
    """The hashes of a prompt's pages by docs/events.md."""

    def short(raw: bytes) -> int:
        number = int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")
        return number % (1 << 63) or 1

    chain = short(namespace.to_wire())
    return [chain := short(chain.to_bytes(8, "little") + page) for page in pages]
