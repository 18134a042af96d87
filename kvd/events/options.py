"""Where and how one pool's KV events are published. Values only, no I/O."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsOptions:
    """Endpoints are ZeroMQ addresses to bind, ipc:// or tcp://.

    Whoever can connect reads every cached prompt's token ids and the tenants' salts. So a tcp://
    endpoint that other hosts reach has keys (CURVE: encrypted, and only for clients whose keys are
    listed), unless the operator says that it needs none.
    """

    endpoint: str  # PUB: the live stream
    replay_endpoint: str | None = None  # ROUTER: replay and snapshots; None: neither
    topic: str = ""  # first frame of every message; llm-d wants kv@ADDRESS@MODEL
    buffer_steps: int = 10_000  # batches kept for replay (fewer if they are over 64 MiB)
    hwm: int = 10_000  # messages queued for one slow subscriber; what comes then, it loses
    heartbeat_s: float = 10.0  # an empty batch after this long without one; 0: never
    secret_key_file: Path | None = None  # kvd's own pair of keys, as zmq.auth writes it
    client_keys: Path | None = None  # file, or folder of *.key files: who may connect
    insecure_plaintext: bool = False  # prompts travel readable to whoever connects, from anywhere

    def __post_init__(self) -> None:
        """Raises ValueError for what no publisher can run with."""
        for name, least in (("buffer_steps", 1), ("hwm", 1), ("heartbeat_s", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name} = {value}: must be at least {least}")
        if (self.secret_key_file is None) != (self.client_keys is None):
            raise ValueError(
                "secret_key_file and client_keys: give both, kvd's own keys and those of its "
                "clients, or neither"
            )
        if self.has_keys and self.insecure_plaintext:
            raise ValueError("insecure_plaintext = true: with keys nothing is plain; leave it out")
        for endpoint in (self.endpoint, self.replay_endpoint):
            if endpoint and reaches_out(endpoint) and not self.has_keys | self.insecure_plaintext:
                raise ValueError(
                    f"endpoint {endpoint}: other hosts could read every prompt there; give "
                    "secret_key_file and client_keys, bind it to 127.0.0.1, or say "
                    "insecure_plaintext = true"
                )

    @property
    def has_keys(self) -> bool:
        return self.secret_key_file is not None


def reaches_out(endpoint: str) -> bool:
    """Whether other hosts may reach a tcp:// endpoint; names of interfaces and hosts may be
    anything."""
    if not endpoint.startswith("tcp://"):
        return False
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
