"""`kvdctl flush`: make cached KV unmatchable, at once.

Message   {"op": "flush", "args": {"pool": nil, "model": nil, "weights_version": nil,
           "adapter": nil, "salt": nil}}: the namespaces with these fields; nil is any
Reply     {"pool": "default", "namespaces": 2}
Command   kvdctl flush (--all | [--model FINGERPRINT] [--weights-version N] [--adapter-hex HEX]
          [--salt TEXT | --salt-file FILE]) [--pool NAME] [-o json]
          --salt "" means the namespaces without a salt. What sessions hold stays readable to them.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin import prompts
from kvd.admin.style import Style, count
from kvd.admin.verb import Reply, UsageError, Verb, pool_argument


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every namespace of the pool")
    prompts.namespace_arguments(parser)
    pool_argument(parser)


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    fields = (args.model, args.weights_version, prompts.adapter(args), prompts.salt(args))
    chosen = any(field is not None for field in fields)
    if args.all == chosen:
        raise UsageError("flush: say which namespaces (--model, --salt, …), or --all, not both")
    return verbs.flush(*fields, pool=args.pool)


def render(reply: Reply, style: Style) -> str:
    return f"pool {reply['pool']}: {count(reply['namespaces'], 'namespace')} flushed"


VERB = Verb(
    help="make cached KV unmatchable, at once",
    arguments=arguments,
    call=call,
    page=lambda reply, style, args: render(reply, style),
)
