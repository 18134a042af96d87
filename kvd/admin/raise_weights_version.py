"""`kvdctl raise-weights-version`: the model has new weights; KV of the old ones is not shared now.

Message   {"op": "raise_weights_version", "args": {"pool": nil, "model": nil (every), "version": 2}}
Reply     {"pool": "default", "namespaces": 2}: so many were flushed
Command   kvdctl raise-weights-version N [--model FINGERPRINT] [--pool NAME] [-o json]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin.style import Style, count
from kvd.admin.verb import Reply, Verb, pool_argument, positive


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("version", type=positive, metavar="N", help="the lowest still shared")
    parser.add_argument("--model", metavar="FINGERPRINT", help="of this model only")
    pool_argument(parser)


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.raise_weights_version(args.version, args.model, args.pool)


def render(reply: Reply, style: Style, version: int) -> str:
    flushed = count(reply["namespaces"], "namespace")
    return f"pool {reply['pool']}: weights version {version} from now on; {flushed} flushed"


VERB = Verb(
    help="stop sharing KV of older weights",
    arguments=arguments,
    call=call,
    page=lambda reply, style, args: render(reply, style, args.version),
)
