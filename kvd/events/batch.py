"""One batch of events in the making: vLLM's, a msgpack array [time, [event, ...], rank].

docs/events.md has each event's fields and the versions that this was checked against.
"""

from __future__ import annotations

from typing import Any

import msgpack

from kvd.events.page_table import NONE, Origin

RANK = 0  # of data parallelism: each rank would have a pool and a stream of its own


class Batch:
    """Events in the order in which they are to be applied; consecutive ones of a kind are one."""

    def __init__(self, page_size: int, medium: str) -> None:
        self._page_size, self._medium = page_size, medium
        self._events: list[dict[str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._events)

    def cleared(self, epoch: bytes) -> None:
        self._events.append({"type": "AllBlocksCleared", "epoch": epoch.hex()})

    def stored(self, origin: Origin, parent: int, hashes: list[int], tokens: list[int]) -> None:
        """Pages that continue each other, behind the page with the hash `parent` (NONE: at the
        start of a prompt)."""
        last = self._events[-1] if self._events else {}
        if "token_ids" in last and last["block_hashes"][-1] == parent:
            last["block_hashes"] += hashes
            last["token_ids"] += tokens
        else:
            last = self._stored(origin, parent, hashes, tokens)
            self._events.append(last)
        if origin.lora_name or origin.cache_salt:
            last.setdefault("extra_keys", []).extend(_extra_keys(origin, parent, len(hashes)))

    def _stored(
        self, origin: Origin, parent: int, hashes: list[int], tokens: list[int]
    ) -> dict[str, Any]:
        event: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": list(hashes),
            "parent_block_hash": None if parent == NONE else parent,
            "token_ids": list(tokens),
            "block_size": self._page_size,
            "lora_id": None,
            "medium": self._medium,
            "lora_name": origin.lora_name,
        }
        if origin.cache_salt:
            event["cache_salt"] = origin.cache_salt
        return event

    def removed(self, hashes: list[int]) -> None:
        if not hashes:
            return
        if self._events and self._events[-1]["type"] == "BlockRemoved":
            self._events[-1]["block_hashes"] += hashes
            return
        self._events.append(
            {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": self._medium}
        )

    def encode(self, now: float) -> bytes:
        """`now`: seconds since 1970."""
        # The rank is always there: Dynamo reads exactly three elements.
        return msgpack.packb([now, self._events, RANK])


def _extra_keys(origin: Origin, parent: int, count: int) -> list[list[str] | None]:
    """One entry a page: its adapter, and on a prompt's first page the salt."""
    every = [origin.lora_name] if origin.lora_name else []
    first = [*every, origin.cache_salt] if origin.cache_salt and parent == NONE else every
    return [keys or None for keys in (first, *[every] * (count - 1))]
