"""What a pool's pages look like, and the arithmetic of pages and slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvd_shared.errors import BadRequest

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayout:
    """Geometry of one page: `[layer][k|v][kv_head][slot][head_dim]` of `dtype`, page-major."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens
    dtype: str  # of the stored K and V

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "page_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadRequest(f"{name} = {value!r}: must be a whole number of at least 1")
        size = self.page_size
        if not MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE or size & (size - 1):
            raise BadRequest(
                f"page_size = {size}: must be a power of two "
                f"from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE} (tokens)"
            )
        if self.dtype not in DTYPE_BYTES:
            raise BadRequest(f"dtype = {self.dtype!r}: must be one of {', '.join(DTYPE_BYTES)}")

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.bytes_per_token

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_wire(cls, wire: Any) -> PoolLayout:
        names = set(cls.__slots__)
        if not isinstance(wire, dict) or set(wire) != names:
            raise BadRequest(f"layout {wire!r}: must be a map with exactly {sorted(names)}")
        return cls(**wire)

    def describe(self) -> str:
        return (
            f"{self.num_layers} layers x {self.num_kv_heads} kv heads x {self.head_dim}, "
            f"{self.dtype}, page {self.page_size} tokens"
        )


def pages_needed(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)
