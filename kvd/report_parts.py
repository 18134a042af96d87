"""What reports and changes have in common: which pool is meant, slices, what stays private."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from hashlib import blake2b
from typing import Any

from kvd.arguments import Arguments
from kvd.daemon import Daemon, Pool
from kvd_shared.errors import UnknownPool, brief
from kvd_shared.namespace import Namespace

Result = dict[str, Any]
Sliced = Generator[None, None, Result]  # what takes longer than a turn of the loop may
HASHED_A_SLICE = 256 << 10  # bytes
# Without it, who sees a digest could try prompts and salts until one has it.
_KEY = secrets.token_bytes(16)


def named_pool(daemon: Daemon, args: Arguments) -> Pool:
    """Of the argument `pool`; nil, or absent, is the only one."""
    name = args.optional_string("pool")
    if name is None and len(daemon.pools) == 1:
        return next(iter(daemon.pools.values()))
    if name not in daemon.pools:
        raise UnknownPool(f"no pool {brief(name)}; there are: {', '.join(sorted(daemon.pools))}")
    return daemon.pools[name]


def space_to_wire(space: Namespace) -> Result:
    """A namespace as reports show it."""
    return {
        "model": space.model,
        "weights_version": space.weights_version,
        "adapter": digest(space.adapter),
        "salt": digest(space.salt),
    }


def digest(private: bytes) -> str:
    """What is shown of tenants' salts and adapters; nothing for nothing."""
    return blake2b(private, digest_size=6, key=_KEY).hexdigest() if private else ""


def sliced_digest(above: str, tokens: bytes) -> Generator[None, None, str]:
    """What is shown of a node's tokens, given that of its parent; prompts are private."""
    state = blake2b(above.encode(), digest_size=6, key=_KEY)
    for start in range(0, len(tokens), HASHED_A_SLICE):
        if start:
            yield
        state.update(tokens[start : start + HASHED_A_SLICE])
    return state.hexdigest()
