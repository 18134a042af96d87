"""`kvdctl who-holds`: a page's state, and which sessions hold it.

Message   {"op": "who_holds", "args": {"pool": nil, "page": 17}}
Reply     {"pool": "default", "page": 17, "generation": 3, "state": "shared", "position": 0
           (pages of the prompt before it; nil: not in the tree),
           "holders": [{"session": 3, "name": "w0", "holds": 2}]}
Command   kvdctl who-holds PAGE [--pool NAME] [-o json]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin.style import Style, count, printable, table
from kvd.admin.verb import Reply, Verb, as_observer, pool_argument, whole


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("page", type=whole, metavar="PAGE", help="its number, from 0")
    pool_argument(parser)


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.who_holds(args.page, args.pool)


def render(reply: Reply, style: Style) -> str:
    place = "" if reply["position"] is None else f", behind {count(reply['position'], 'page')}"
    head = f"page {reply['page']}, generation {reply['generation']}: {reply['state']}{place}"
    if not reply["holders"]:
        return f"{head}\nheld by nobody"
    rows = [[str(h["session"]), printable(h["name"]), h["holds"]] for h in reply["holders"]]
    return f"{head}\n{table(('SESSION', 'NAME', 'HOLDS'), rows, style)}"


VERB = Verb(
    help="a page's state, and which sessions hold it",
    arguments=arguments,
    call=call,
    page=lambda reply, style, args: render(reply, style),
    role=as_observer,
)
