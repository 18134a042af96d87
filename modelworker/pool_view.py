"""A pool's pages as torch tensors, in place."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from kvd_shared.layout import PoolLayout
from kvd_shared.lease import PoolOffer
from kvd_shared.mapping import PoolMapping

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class PoolView:
    """The same memory twice: reads go through one mapping, KV writes through the other.

    Both are `[pages, layers, 2 (k, v), kv_heads, page_size, head_dim]` of the pool's dtype.
    """

    layout: PoolLayout
    read: torch.Tensor
    write: torch.Tensor

    @classmethod
    def private(cls, layout: PoolLayout, num_pages: int) -> PoolView:
        """Pages of this process alone, without a daemon: for `verify` and tests.

        Filled with NaN, so that reading what nothing wrote is seen.
        """
        pages = torch.full(
            page_shape(layout, num_pages), float("nan"), dtype=TORCH_DTYPES[layout.dtype]
        )
        return cls(layout, pages, pages)

    @classmethod
    def attached(cls, offer: PoolOffer, mapping: PoolMapping) -> PoolView:
        """The mapped pool of a daemon. Good until the mapping is closed."""
        shape = page_shape(offer.layout, offer.num_pages)
        dtype = TORCH_DTYPES[offer.layout.dtype]

        def view(address: int) -> torch.Tensor:
            # from the address: a read-only buffer makes torch warn about what is wanted here
            memory = (ctypes.c_char * mapping.num_bytes).from_address(address)
            return torch.frombuffer(memory, dtype=dtype).view(shape)

        return cls(offer.layout, view(mapping.read_address), view(mapping.write_address))

    @property
    def num_pages(self) -> int:
        return self.read.shape[0]


def page_shape(layout: PoolLayout, num_pages: int) -> tuple[int, ...]:
    return (
        num_pages,
        layout.num_layers,
        2,
        layout.num_kv_heads,
        layout.page_size,
        layout.head_dim,
    )
