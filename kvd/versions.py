"""Which weights versions are too old to share their KV."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvd_shared.errors import BadRequest, StaleVersion
from kvd_shared.namespace import MAX_FIELD_BYTES, MAX_VERSION, Namespace

if TYPE_CHECKING:
    from kvd.metadata.weights import WeightsTable

MAX_MODELS = 1024


class Versions:
    """Invariant: minimums only rise, and the metadata's table says the same."""

    def __init__(self, table: WeightsTable) -> None:
        self._table = table
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
        if model is not None:
            if len(model.encode()) > MAX_FIELD_BYTES:
                raise BadRequest(f"a model's name of over {MAX_FIELD_BYTES} bytes: none has one")
            if model not in self.minimums and len(self.minimums) >= MAX_MODELS:
                raise BadRequest(
                    f"{MAX_MODELS} models have a version of their own already: raise that of all "
                    "models"
                )
        self._table.raised(model, version)
        self._set(model, version)

    def restore(self, versions: dict[str | None, int]) -> None:
        """What the table said after a restart."""
        for model, version in versions.items():
            self._set(model, version)

    def _set(self, model: str | None, version: int) -> None:
        if model is None:
            self.minimum = version
        else:
            self.minimums[model] = version
