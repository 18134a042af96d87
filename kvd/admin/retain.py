"""`kvdctl retain`: keep a cached prompt, whatever else is needed.

Message   {"op": "retain_prompt", "args": {"namespace": bin, "tokens": int32s, "pool": nil,
           "duration_s": 3600 or nil (until released)}}
Reply     {"pool": "default", "number": 1, "tokens": 416}: so many of them are cached, and kept
Command   kvdctl retain FILE [--for SECONDS] [--model FINGERPRINT] [--weights-version N]
          [--adapter-hex HEX] [--salt TEXT | --salt-file FILE] [--pool NAME] [-o json]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin import prompts
from kvd.admin.style import Style, count
from kvd.admin.verb import Reply, Verb, pool_argument, positive


def arguments(parser: ArgumentParser) -> None:
    prompts.prompt_arguments(parser)
    parser.add_argument(
        "--for",
        dest="duration_s",
        type=positive,
        metavar="SECONDS",
        help="how long (default: until it is released)",
    )
    pool_argument(parser)


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    tokens = prompts.tokens(args)
    return verbs.retain_prompt(prompts.namespace(args), tokens, args.duration_s, args.pool)


def render(reply: Reply, style: Style) -> str:
    kept, number = count(reply["tokens"], "token"), reply["number"]
    return f"pool {reply['pool']}: {kept} retained; kvdctl release {number} ends it"


VERB = Verb(
    help="keep a cached prompt, within the operators' quota",
    arguments=arguments,
    call=call,
    look=prompts.look,
    page=lambda reply, style, args: render(reply, style),
)
