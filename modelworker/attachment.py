"""A worker's tie to a daemon: session, mapped pool, and the runner over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvd_shared.client import KvdClient
from kvd_shared.errors import DaemonUnreachable
from kvd_shared.lease import GEOMETRY, PoolOffer
from modelworker.model import Model
from modelworker.pool_view import PoolView
from modelworker.runner import ModelRunner

Attach = Callable[[], "Attachment"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """Good until `client` raises DaemonUnreachable or SessionEnded; then attach anew."""

    client: KvdClient
    pool: PoolOffer
    runner: ModelRunner

    @property
    def pool_tokens(self) -> int:
        """The most tokens that a sequence can have, with the pool to itself."""
        return self.pool.num_pages * self.pool.layout.page_size

    def close(self) -> None:
        """Unmaps the pool; the runner must not be used after it."""
        self.client.close()


def attach(
    socket_dir: Path, name: str, model: Model, fingerprint: str, pool: str | None = None
) -> Attachment:
    """Raises DaemonUnreachable or Draining (retryable), LayoutMismatch, UnknownPool, NotAllowed."""
    geometry = {name: getattr(model.config, name) for name in GEOMETRY}
    client = KvdClient.attach(
        socket_dir, name=name, pool=pool, geometry=geometry, model=fingerprint
    )
    if client.pool is None or client.mapping is None:
        client.close()
        raise DaemonUnreachable(f"the daemon at {socket_dir} gave a worker no pool")
    view = PoolView.attached(client.pool, client.mapping)
    return Attachment(client, client.pool, ModelRunner(model, view))
