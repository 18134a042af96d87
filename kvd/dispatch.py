"""From an operation's name to what does it, and who may ask for it."""

from __future__ import annotations

from typing import Any

from kvd.arguments import Arguments
from kvd.changes import CHANGES
from kvd.daemon import Attachment, Daemon
from kvd.operations import OPERATIONS, step
from kvd.report_parts import Result, Sliced
from kvd.reports import REPORTS
from kvd_shared.errors import BadRequest, NotAllowed, brief
from kvd_shared.wire import Frames

FOR_ADMINS = REPORTS | CHANGES


def perform(
    daemon: Daemon, attachment: Attachment, op: Any, args: Any, frames: Frames, now: float
) -> Result | Sliced:
    """One operation of one session; arrays in the result are bytes. What takes longer than a turn
    of the loop may is a generator, which returns the result in the end."""
    if not isinstance(op, str):
        raise BadRequest(f"op {brief(op)} must be a string")
    if op not in FOR_ADMINS and op not in OPERATIONS and op not in ("step", "detach"):
        raise BadRequest(f"no operation {brief(op)}")
    arguments = Arguments(op, args, frames)
    if op in FOR_ADMINS:
        if attachment.role != "admin":
            raise NotAllowed(f"{op} needs role admin; this session is a {attachment.role}")
        return FOR_ADMINS[op](daemon, arguments, now)
    if op == "detach":
        arguments.done()
        daemon.dead(attachment, now)
        return {}
    pool, session = attachment.pool, attachment.session
    if pool is None or session is None:
        raise NotAllowed(f"{op} needs role worker; this session is an {attachment.role}")
    pool.cache.num_changes += 1
    if op == "step":
        return step(pool.cache, session, arguments, frames, now)
    return OPERATIONS[op](pool.cache, session, arguments, now)
