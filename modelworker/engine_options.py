"""What an engine is told when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from kvd_shared.namespace import Namespace
from modelworker.scheduler import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """`max_queued`: sequences that may wait to be admitted; a request of more is refused, unless
    none waits."""

    model: str  # for the namespace: fingerprint, and the dtype that K and V are computed in
    context_len: int
    vocab_size: int  # the model's; a tokenizer may know more ids than the model has rows for
    limits: Limits
    drain_timeout_s: float = 30.0  # after `stop`, for what was accepted
    kvd_outage_s: float = 60.0  # for so long requests wait for kvd to come back
    max_queued: int = 1024
    weights_version: int = 0

    def namespace(self, salt: bytes) -> Namespace:
        """Raises BadRequest for a salt that is none."""
        return Namespace(model=self.model, weights_version=self.weights_version, salt=salt)
