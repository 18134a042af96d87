"""`kvdctl evict`: make cached pages free before they are needed.

Message   {"op": "evict", "args": {"pool": nil, "num_pages": 100}}
Reply     {"pool": "default", "num_pages": 80}: so many went, for the others are held
Command   kvdctl evict N [--pool NAME] [-o json]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin.style import Style, count
from kvd.admin.verb import Reply, Verb, pool_argument, positive


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("num_pages", type=positive, metavar="N", help="evict up to N pages")
    pool_argument(parser)


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.evict(args.num_pages, args.pool)


def render(reply: Reply, style: Style) -> str:
    return f"pool {reply['pool']}: {count(reply['num_pages'], 'page')} evicted"


VERB = Verb(
    help="make cached pages free before they are needed",
    arguments=arguments,
    call=call,
    page=lambda reply, style, args: render(reply, style),
)
