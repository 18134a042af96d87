"""From an operation's name to what does it, and who may ask for it."""

from __future__ import annotations

from typing import Any

from kvd.arguments import Arguments
from kvd.changes import CHANGES
from kvd.daemon import Attachment, Daemon
from kvd.operations import OPERATIONS, step
from kvd.report_parts import Result, Sliced
from kvd.reports import REPORTS
from kvd.resume import declare
from kvd.tree_report import tree
from kvd_shared.errors import BadRequest, NotAllowed, brief
from kvd_shared.wire import Frames

FOR_ADMINS = REPORTS | CHANGES
# What shows neither tokens nor salts, and does not tell whether a given prompt is cached.
FOR_OBSERVERS = REPORTS.keys() - {"explain"}
_OTHERS = ("step", "detach", "declare")


def perform(
    daemon: Daemon, attachment: Attachment, op: Any, args: Any, frames: Frames, now: float
) -> Result | Sliced:
    """One operation of one session; arrays in the result are bytes. What takes longer than a turn
    of the loop may is a generator, which returns the result in the end."""
    if not isinstance(op, str):
        raise BadRequest(f"op {brief(op)} must be a string")
    if op not in FOR_ADMINS and op not in OPERATIONS and op not in _OTHERS:
        raise BadRequest(f"no operation {brief(op)}")
    arguments = Arguments(op, args, frames)
    if op in FOR_ADMINS:
        wanted = ("admin", "observer") if op in FOR_OBSERVERS else ("admin",)
        if attachment.role not in wanted:
            raise _wrong_role(op, " or ".join(wanted), attachment)
        if op == "tree" and attachment.role == "admin":
            return tree(daemon, arguments, now, show_tokens=daemon.access.show_token_ids)
        return FOR_ADMINS[op](daemon, arguments, now)
    if op == "detach":
        arguments.done()
        daemon.dead(attachment, now, "detached")
        return {}
    pool, session = attachment.pool, attachment.session
    if pool is None or session is None:
        raise _wrong_role(op, "worker", attachment)
    pool.cache.num_changes += 1
    if op == "declare":
        return declare(attachment, arguments, now)
    if op == "step":
        return step(pool.cache, session, arguments, frames, now)
    return OPERATIONS[op](pool.cache, session, arguments, now)


def _wrong_role(op: str, wanted: str, attachment: Attachment) -> NotAllowed:
    article = "a" if attachment.role == "worker" else "an"
    return NotAllowed(
        f"{op} needs role {wanted}; this session is {article} {attachment.role}",
        reason="wrong_role",
    )
