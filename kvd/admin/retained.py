"""`kvdctl retained`: what operators keep.

Message   {"op": "retained", "args": {"pool": nil}}
Reply     {"pool": "default", "num_pages": 26, "quota": 1024, "retained": [{"number": 1,
           "pages": 26, "tokens": 416, "expires_s": nil (when released) or in seconds,
           "matchable": true (false: flushed since), "model": "9c1e…", "weights_version": 0,
           "adapter": hex, "salt": hex}]}
Command   kvdctl retained [--pool NAME] [-o json]
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from kvd.admin.style import Style, count, duration, printable, shortened, table
from kvd.admin.verb import Reply, Verb, as_observer, pool_argument

HEAD = ("N", "TOKENS", "PAGES", "ENDS", "MODEL", "VERSION", "SALT", "")


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.retained(args.pool)


def render(reply: Reply, style: Style) -> str:
    pages = f"{reply['num_pages']:,} of {count(reply['quota'], 'page')}"
    head = f"pool {reply['pool']}: {pages} retained"
    if not reply["retained"]:
        return head
    return f"{head}\n{table(HEAD, [_row(one) for one in reply['retained']], style)}"


def _row(one: Reply) -> list[str | int]:
    ends = "released" if one["expires_s"] is None else f"in {duration(max(one['expires_s'], 0))}"
    return [
        str(one["number"]),
        one["tokens"],
        one["pages"],
        ends,
        shortened(printable(one["model"])),
        str(one["weights_version"]),
        one["salt"] or "-",
        "" if one["matchable"] else "flushed: release it",
    ]


VERB = Verb(
    help="what operators keep",
    arguments=pool_argument,
    call=call,
    page=lambda reply, style, args: render(reply, style),
    role=as_observer,
)
