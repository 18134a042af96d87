"""Tokens and references in the forms that tests write them in."""

from __future__ import annotations

import numpy as np

from kvd_shared.refs import TOKEN_BYTES, refs_from_bytes

PAGE_SIZE = 8
PAGE_BYTES = PAGE_SIZE * TOKEN_BYTES


def page_tokens(tokens: str) -> bytes:
    """One page of tokens for each letter: "ab" are 8 times 97 and 8 times 98."""
    return b"".join(np.full(PAGE_SIZE, ord(t), dtype="<i4").tobytes() for t in tokens)


def packed(refs: list[int]) -> bytes:
    return np.array(refs, dtype="<i8").tobytes()


def unpacked(refs: bytes | bytearray) -> list[int]:
    return refs_from_bytes(bytes(refs)).tolist()
