"""Which kernels serve a device. The only place that decides it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvd_kernels import cpu
from kvd_shared.errors import KvdError


class NoKernels(KvdError):
    """No attention kernels exist for the device that the pages lie on."""

    code = "NO_KERNELS"


class Kernels(Protocol):
    """What a device's kernels offer; shapes as in `kvd_kernels.cpu`."""

    def write_kv(
        self, pages: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Store each token's K and V at its slot."""
        ...

    def copy_pages(
        self,
        source_pages: torch.Tensor,
        target_pages: torch.Tensor,
        sources: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        """Copy whole pages."""
        ...

    def plan(
        self,
        query_starts: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[torch.Tensor],
        page_size: int,
    ) -> Any:
        """Prepare attention once for all layers of a step; the result is the kernels' own."""
        ...

    def paged_attention(
        self, q: torch.Tensor, pages: torch.Tensor, layer: int, plans: Any
    ) -> torch.Tensor:
        """Causal attention of the new tokens over their sequences' pages."""
        ...


def kernels_for(device: torch.device) -> Kernels:
    """The kernels that read pages on `device`. Raises NoKernels: nothing slower steps in."""
    if device.type == "cpu":
        return cpu
    raise NoKernels(
        f"kernels for {device.type} are not built yet: keep the pool and the model on the CPU "
        "(device = cpu)",
        device=device.type,
    )
