"""Identity under which KV may be shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack

from kvd_shared.errors import BadRequest

MAX_FIELD_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """KV is interchangeable only within one namespace (and one pool's layout).

    `model` is the fingerprint of config and weights content, `weights_version` its counter,
    `adapter` identifies an adapter's content, `salt` separates tenants.
    """

    model: str
    weights_version: int = 0
    adapter: bytes = b""
    salt: bytes = b""

    def __post_init__(self) -> None:
        """Raises BadRequest where a field is over its limit."""
        if self.weights_version < 0:
            raise BadRequest(f"weights version {self.weights_version}: must be at least 0")
        sizes = {"model": self.model.encode(), "adapter": self.adapter, "salt": self.salt}
        for name, raw in sizes.items():
            if len(raw) > MAX_FIELD_BYTES:
                raise BadRequest(
                    f"a namespace's {name} of {len(raw)} bytes: the limit is {MAX_FIELD_BYTES} "
                    "bytes; use a digest of it"
                )

    def to_wire(self) -> bytes:
        """Typed and length-framed (msgpack array), so no two identities share an encoding."""
        return msgpack.packb([self.model, self.weights_version, self.adapter, self.salt])

    @classmethod
    def from_wire(cls, raw: Any) -> Namespace:
        try:
            model, version, adapter, salt = msgpack.unpackb(raw, raw=False, use_list=True)
        except (ValueError, TypeError, msgpack.UnpackException) as e:
            raise BadRequest(f"namespace is not [model, version, adapter, salt]: {e}") from e
        kinds = (type(model), type(version), type(adapter), type(salt))
        if kinds != (str, int, bytes, bytes):
            raise BadRequest(
                f"namespace fields have types {[k.__name__ for k in kinds]}; "
                "wanted [str, int, bytes, bytes]"
            )
        return cls(model=model, weights_version=version, adapter=adapter, salt=salt)
