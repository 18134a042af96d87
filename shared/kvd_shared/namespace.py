"""Identity under which KV may be shared."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import msgpack

from kvd_shared.errors import BadRequest

MAX_FIELD_BYTES = 1024
MAX_VERSION = (1 << 63) - 1
REMEMBERED = 4096


class _Fields(NamedTuple):
    model: str
    weights_version: int
    adapter: bytes
    salt: bytes


class Namespace(_Fields):
    """KV is interchangeable only within one namespace (and one pool's layout).

    `model` is the fingerprint of config and weights content, `weights_version` its counter,
    `adapter` identifies an adapter's content, `salt` separates tenants.

    A tuple, because it is a key that is looked up all the time.
    """

    __slots__ = ()

    def __new__(
        cls, *, model: str, weights_version: int = 0, adapter: bytes = b"", salt: bytes = b""
    ) -> Namespace:
        """Raises BadRequest where a field is over its limit."""
        if not 0 <= weights_version <= MAX_VERSION:
            raise BadRequest(f"weights version {weights_version}: must be from 0 to {MAX_VERSION}")
        sizes = {"model": model.encode(), "adapter": adapter, "salt": salt}
        for name, raw in sizes.items():
            if len(raw) > MAX_FIELD_BYTES:
                raise BadRequest(
                    f"a namespace's {name} of {len(raw)} bytes: the limit is {MAX_FIELD_BYTES} "
                    "bytes; use a digest of it"
                )
        return super().__new__(cls, model, weights_version, adapter, salt)

    def to_wire(self) -> bytes:
        """Typed and length-framed (msgpack array), so no two identities share an encoding."""
        return msgpack.packb([self.model, self.weights_version, self.adapter, self.salt])

    @classmethod
    def from_wire(cls, raw: Any) -> Namespace:
        """Raises BadRequest. The same few come with every request: the latest are remembered."""
        if type(raw) is not bytes:
            raise BadRequest(f"namespace must be bytes, not {type(raw).__name__}")
        return _decode(raw)

    @classmethod
    def _from_bytes(cls, raw: bytes) -> Namespace:
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


@lru_cache(REMEMBERED)
def _decode(raw: bytes) -> Namespace:
    return Namespace._from_bytes(raw)
