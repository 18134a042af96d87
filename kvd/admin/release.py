"""`kvdctl release`: end what `kvdctl retain` began.

Message   {"op": "release_prompt", "args": {"pool": nil, "number": 1}}
Reply     {"pool": "default"}
Command   kvdctl release N [--pool NAME] [-o json]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin.verb import Verb, pool_argument, positive


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("number", type=positive, metavar="N", help="as `retained` lists it")
    pool_argument(parser)


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.release_prompt(args.number, args.pool)


VERB = Verb(
    help="end what `retain` began",
    arguments=arguments,
    call=call,
    page=lambda reply, style, args: f"pool {reply['pool']}: released {args.number}",
)
