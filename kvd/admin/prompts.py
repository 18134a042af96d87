"""Arguments that name a namespace and a prompt's tokens, as several verbs have them."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvd.admin.verb import UsageError, whole

if TYPE_CHECKING:
    from kvd_shared.namespace import Namespace as Space

MAX_NODES_LOOKED_AT = 1000


def namespace_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FINGERPRINT", help="of the namespace")
    parser.add_argument(
        "--weights-version", type=whole, metavar="N", help="of the model in the namespace"
    )
    parser.add_argument("--adapter-hex", metavar="HEX", help="what identifies the adapter")
    salt = parser.add_mutually_exclusive_group()
    salt.add_argument("--salt", metavar="TEXT", help="of the tenant")
    salt.add_argument(
        "--salt-file", type=Path, metavar="FILE", help="the same, without its last line end"
    )


def prompt_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "tokens", metavar="FILE", help="a JSON list of token ids; -: standard input"
    )
    namespace_arguments(parser)


def look(args: Namespace) -> Any:
    """Which namespaces there are, for the case that one need not be named."""
    from kvd_shared import verbs

    return verbs.tree(args.pool, MAX_NODES_LOOKED_AT)


def namespace(args: Namespace) -> Space:
    """As named; model and version, where they are not, as the only ones that are cached."""
    from kvd_shared.errors import BadRequest
    from kvd_shared.namespace import Namespace as Space

    cached = args.seen["namespaces"]
    model, version = args.model, args.weights_version
    if model is None:
        model = _only("model", {space["model"] for space in cached})
    if version is None:
        versions = {space["weights_version"] for space in cached if space["model"] == model}
        version = max(versions, default=0)
    try:
        return Space(
            model=model,
            weights_version=version,
            adapter=adapter(args) or b"",
            salt=salt(args) or b"",
        )
    except BadRequest as e:
        raise UsageError(e.message) from e


def tokens(args: Namespace) -> list[int]:
    """Raises UsageError."""
    name = "standard input" if args.tokens == "-" else args.tokens
    try:
        text = sys.stdin.read() if args.tokens == "-" else Path(args.tokens).read_text()
        found = json.loads(text)
    except (OSError, ValueError) as e:
        raise UsageError(f"{name}: cannot be read as JSON: {e}") from e
    if not isinstance(found, list) or not all(type(token) is int for token in found):
        raise UsageError(f"{name}: must hold a list of token ids, as in [1, 2, 3]")
    for token in found:
        if not 0 <= token < 1 << 31:
            raise UsageError(f"{name}: {token} is no token id: must be from 0 to {(1 << 31) - 1}")
    return found


def adapter(args: Namespace) -> bytes | None:
    try:
        return None if args.adapter_hex is None else bytes.fromhex(args.adapter_hex)
    except ValueError as e:
        raise UsageError(f"--adapter-hex {args.adapter_hex!r}: {e}") from e


def salt(args: Namespace) -> bytes | None:
    if args.salt_file is None:
        return None if args.salt is None else str(args.salt).encode()
    try:
        raw: bytes = args.salt_file.read_bytes()
    except OSError as e:
        raise UsageError(f"{args.salt_file}: {e.strerror}") from e
    return raw.removesuffix(b"\n")


def _only(what: str, found: set[str]) -> str:
    if not found:
        raise UsageError(f"nothing is cached, so say which namespace is meant: --{what}")
    if len(found) > 1:
        raise UsageError(f"several are cached, say which with --{what}: {', '.join(sorted(found))}")
    return found.pop()
