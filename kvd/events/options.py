"""Where and how one pool's KV events are published. Values only, no I/O."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsOptions:
    """Endpoints are ZeroMQ addresses to bind, ipc:// or tcp://.

    Whoever can connect reads every cached prompt's token ids and the tenants' salts.
    """

    endpoint: str  # PUB: the live stream
    replay_endpoint: str | None = None  # ROUTER: replay and snapshots; None: neither
    topic: str = ""  # first frame of every message; llm-d wants kv@ADDRESS@MODEL
    buffer_steps: int = 10_000  # batches kept for replay (fewer if they are over 64 MiB)
    hwm: int = 10_000  # messages queued for one slow subscriber; what comes then, it loses
    heartbeat_s: float = 10.0  # an empty batch after this long without one; 0: never

    def __post_init__(self) -> None:
        """Raises ValueError for what no publisher can run with."""
        for name, least in (("buffer_steps", 1), ("hwm", 1), ("heartbeat_s", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name} = {value}: must be at least {least}")
