"""`kvdctl sessions`: who is attached, and what they hold.

Message   {"op": "sessions", "args": {}}
Reply     {"sessions": [{"id": 3, "name": "w0", "role": "worker", "pid": 812, "uid": 0,
           "pool": "default" or nil, "age_s": 5.2, "state": "live" or "quarantined",
           "held_pages": 26, "writing_pages": 1, "leased_pages": 2, "sequences": 1,
           "running_requests": 1, "waiting_requests": 0,
           "requests": [{"number": 9, "running": true}] (the first 1000)}]}
Command   kvdctl sessions [-o json]
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from kvd.admin.style import Style, duration, printable, table
from kvd.admin.verb import Reply, Verb

HEAD = ("ID", "NAME", "ROLE", "POOL", "PID", "UID", "AGE", "STATE", "HELD")
HEAD_WORK = ("WRITING", "LEASED", "RUNNING", "WAITING")


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.sessions()


def render(reply: Reply, style: Style) -> str:
    rows = [_row(session) for session in sorted(reply["sessions"], key=lambda s: s["id"])]
    return table(HEAD + HEAD_WORK, rows, style)


def _row(session: Reply) -> list[str | int]:
    return [
        str(session["id"]),
        printable(session["name"]),
        session["role"],
        session["pool"] or "-",
        str(session["pid"]),
        str(session["uid"]),
        duration(session["age_s"]),
        session["state"],
        session["held_pages"],
        session["writing_pages"],
        session["leased_pages"],
        session["running_requests"],
        session["waiting_requests"],
    ]


VERB = Verb(
    help="who is attached, and what they hold",
    call=call,
    page=lambda reply, style, args: render(reply, style),
)
