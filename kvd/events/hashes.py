"""Names for cached pages that depend on content alone, so that they agree between hosts.

    seed    = H(namespace as on kvd's wire)
    hash[0] = H(seed      as 8 bytes, little-endian | token ids of page 0, int32 little-endian)
    hash[i] = H(hash[i-1] as 8 bytes, little-endian | token ids of page i)
    H(x)    = BLAKE2b of x, 8 bytes, read little-endian, without its highest bit; 1 instead of 0

Positive int64: some consumers read the hash as signed, and some read 0 as "no parent". 63 bits are
a name, no proof: kvd matches by comparing token ids and never looks at these.
"""

from __future__ import annotations

from hashlib import blake2b

from kvd_shared.namespace import Namespace

_POSITIVE = (1 << 63) - 1


def namespace_seed(namespace: Namespace) -> int:
    return _hash(namespace.to_wire())


def page_hashes(before: int, tokens: bytes, page_bytes: int) -> list[int]:
    """One hash a page. `before`: the hash of the page before, or the namespace's seed."""
    hashes: list[int] = []
    for start in range(0, len(tokens), page_bytes):
        before = _hash(before.to_bytes(8, "little") + tokens[start : start + page_bytes])
        hashes.append(before)
    return hashes


def _hash(raw: bytes) -> int:
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little") & _POSITIVE or 1
