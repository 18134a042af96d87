"""`kvdctl audit`: whether all invariants of a pool hold.

Message   {"op": "audit", "args": {"pool": nil}}
Reply     {"pool": "default", "ok": true, "finding": nil or what does not hold, "complete": true}
Command   kvdctl audit [--pool NAME] [-o json]; exit code 8 when something does not hold
          Not complete: the pool was too busy to compare sums over all of it.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from kvd.admin.style import Style
from kvd.admin.verb import Reply, Verb, as_observer, pool_argument
from kvd_shared import exit_codes


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.audit(args.pool)


def render(reply: Reply, style: Style) -> str:
    if not reply["ok"]:
        return f"pool {reply['pool']}: {style.paint('fault', 'red')}: {reply['finding']}"
    busy = "" if reply["complete"] else "; sums were not compared, for the pool was busy"
    return f"pool {reply['pool']}: all invariants hold{busy}"


VERB = Verb(
    help="check the invariants of a pool",
    arguments=pool_argument,
    call=call,
    page=lambda reply, style, args: render(reply, style),
    code=lambda reply: exit_codes.OK if reply["ok"] else exit_codes.PROBLEM_FOUND,
    role=as_observer,
)
