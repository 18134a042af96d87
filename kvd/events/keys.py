"""CURVE keys of one pool's events: kvd's own pair, and the public keys of who may connect.

Files are as zmq.auth writes them. To make a pair, NAME.key and NAME.key_secret:

    python -c "import zmq.auth; zmq.auth.create_certificates('.', 'NAME')"
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq.auth
from zmq.utils import z85

from kvd.events.options import EventsOptions

KEY_BYTES = 32


class BadKeys(ValueError):
    """A key file that cannot be used; says which and why."""


@dataclass(frozen=True, slots=True)
class ServerKeys:
    secret: bytes = field(repr=False)  # kvd's own, as 40 characters (Z85)
    clients: frozenset[bytes]  # public keys, 32 bytes each; not empty


def read_keys(options: EventsOptions) -> ServerKeys:
    """Of options that have keys. Raises BadKeys."""
    assert options.secret_key_file is not None and options.client_keys is not None
    file = options.secret_key_file
    try:
        mode = file.stat().st_mode
    except OSError as e:
        raise BadKeys(f"secret_key_file {file}: {e.strerror}") from e
    if mode & 0o027:
        raise BadKeys(
            f"secret_key_file {file} has mode {stat.S_IMODE(mode):04o}: others could read or "
            "change the secret; chmod 0400 it"
        )
    secret = _pair(file)[1]
    if secret is None:
        raise BadKeys(f"secret_key_file {file} has no secret key: give the *.key_secret file")
    _raw(file, secret)
    source = options.client_keys
    files = sorted(source.glob("*.key")) if source.is_dir() else [source]
    clients = frozenset(_raw(one, _pair(one)[0]) for one in files)
    if not clients:
        raise BadKeys(f"client_keys {source} has no *.key file: nobody could connect")
    return ServerKeys(secret, clients)


def _pair(file: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(file)
    except (OSError, ValueError) as e:
        raise BadKeys(f"{file} is no key file as zmq.auth writes it: {e}") from e


def _raw(file: Path, key: bytes) -> bytes:
    try:
        raw = z85.decode(key)
    except Exception as e:  # whatever a text that is none does to the decoder
        raise BadKeys(f"{file}: its key is not in Z85: {type(e).__name__}") from e
    if len(raw) != KEY_BYTES:
        raise BadKeys(f"{file}: its key has {len(raw)} bytes, not {KEY_BYTES}")
    return bytes(raw)
