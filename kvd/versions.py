"""Which weights versions are too old to share their KV."""

from __future__ import annotations

from kvd_shared.errors import BadRequest, StaleVersion
from kvd_shared.namespace import MAX_VERSION, Namespace

MAX_MODELS = 1024


class Versions:
    """Invariant: minimums only rise."""

    def __init__(self) -> None:
        self.minimum = 0  # of every model
        self.minimums: dict[str, int] = {}  # of single models

    def minimum_of(self, model: str) -> int:
        return max(self.minimum, self.minimums.get(model, 0))

    def is_stale(self, namespace: Namespace) -> bool:
        return namespace.weights_version < self.minimum_of(namespace.model)

    def check(self, namespace: Namespace) -> None:
        if self.is_stale(namespace):
            minimum = self.minimum_of(namespace.model)
            raise StaleVersion(
                f"KV of weights version {namespace.weights_version}; the model is at {minimum}: "
                "compute on, but publish it no more",
                version=namespace.weights_version,
                minimum=minimum,
            )

    def raise_to(self, model: str | None, version: int) -> None:
        """Raises BadRequest unless it is higher than before."""
        before = self.minimum if model is None else self.minimum_of(model)
        if not before < version <= MAX_VERSION:
            raise BadRequest(
                f"weights version {version}: must be above the {before} that it is at, and at most "
                f"{MAX_VERSION}"
            )
        if model is None:
            self.minimum = version
        elif model in self.minimums or len(self.minimums) < MAX_MODELS:
            self.minimums[model] = version
        else:
            raise BadRequest(
                f"{MAX_MODELS} models have a version of their own already: raise that of all models"
            )
