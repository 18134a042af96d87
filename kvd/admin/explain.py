"""`kvdctl explain`: where a match of a prompt stops, and why.

Message   {"op": "explain", "args": {"namespace": bin, "tokens": int32s, "pool": nil}}
Reply     {"pool": "default", "num_tokens": 500, "matched_tokens": 416, "stopped_at_page": 26,
           "why": "evicted", "left_s_ago": 5.2, "unused_before_s": 60.0, "differs_at": nil,
           "computed_by": nil, "other": nil}; see docs/protocol.md for the others
Command   kvdctl explain FILE [--model FINGERPRINT] [--weights-version N] [--adapter-hex HEX]
          [--salt TEXT | --salt-file FILE] [--pool NAME] [-o json]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin import prompts
from kvd.admin.style import Style, count, duration
from kvd.admin.verb import Reply, Verb, pool_argument

LEFT = {
    "evicted": "was evicted to make room",
    "over_share": "was evicted, for its tenant had more than its share",
    "expired": "expired",
    "flushed": "was flushed",
    "stale_version": "was of older weights",
}
WHY = {
    "limit": "all that may match does: the last token is always computed",
    "page_boundary": "all whole pages match; what is left is less than a page",
    "stale_version": "the weights version is older than the model's: nothing of it is shared",
    "never_published": "what follows was never published, as far as is remembered",
}


def arguments(parser: ArgumentParser) -> None:
    prompts.prompt_arguments(parser)
    pool_argument(parser)


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    tokens = prompts.tokens(args)
    return verbs.explain(prompts.namespace(args), tokens, args.pool)


def render(reply: Reply, style: Style) -> str:
    matched = f"{reply['matched_tokens']:,} of {count(reply['num_tokens'], 'token')}"
    return f"pool {reply['pool']}: {matched} match\n{_why(reply)}"


def _why(reply: Reply) -> str:
    why = reply["why"]
    if reply["left_s_ago"] is not None:
        ago, unused = duration(reply["left_s_ago"]), duration(reply["unused_before_s"])
        return f"the page that follows {LEFT[why]}, {ago} ago, unused for {unused} before"
    if why == "differs":
        return f"token {reply['differs_at']:,} is another one than in what is cached"
    if why == "computing":
        by = reply["computed_by"]
        return (
            f"session {by['session']} is computing it up to token {by['tokens']:,} "
            f"(request {by['request']})"
        )
    if why == "other_namespace":
        other = reply["other"]
        fields = " and ".join(other["differs_in"])
        return f"{count(other['matched_tokens'], 'token')} are cached for another {fields}"
    return WHY[why]


VERB = Verb(
    help="where a match of a prompt stops, and why",
    arguments=arguments,
    call=call,
    look=prompts.look,
    page=lambda reply, style, args: render(reply, style),
)
