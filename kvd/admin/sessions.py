"""`kvdctl sessions`: who is attached, and what they hold; `kill` ends one and its process.

Message   {"op": "sessions", "args": {}}
Reply     {"sessions": [{"id": 3, "name": "w0", "role": "worker", "pid": 812, "uid": 0,
           "pool": "default" or nil, "age_s": 5.2, "state": "live" or "quarantined",
           "ended_s_ago": nil or 7.5, "process": "living" or "dead",
           "held_pages": 26, "writing_pages": 1, "leased_pages": 2, "sequences": 1,
           "running_requests": 1, "waiting_requests": 0,
           "requests": [{"number": 9, "running": true}] (the first 1000)}]}
Command   kvdctl sessions [-o json]

Message   {"op": "kill_session", "args": {"session": 3}}
Reply     {"session": 3, "name": "w0", "pid": 812, "held_pages": 26}
Command   kvdctl sessions kill 3 [-o json]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin.style import Style, count, duration, printable, table
from kvd.admin.verb import Reply, UsageError, Verb, as_admin, as_observer, positive

HEAD = ("ID", "NAME", "ROLE", "POOL", "PID", "UID", "AGE", "STATE", "HELD")
HEAD_WORK = ("WRITING", "LEASED", "RUNNING", "WAITING")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "action", nargs="?", choices=("kill",), help="end a session: SIGKILL to its process"
    )
    parser.add_argument("id", nargs="?", type=positive, metavar="ID", help="of the one to kill")


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    if args.action is None:
        return verbs.sessions()
    if args.id is None:
        raise UsageError("sessions kill: which one? Give its ID, as `kvdctl sessions` lists it")
    return verbs.kill_session(args.id)


def render(reply: Reply, style: Style) -> str:
    if "sessions" not in reply:
        return (
            f"killed process {reply['pid']} of session {reply['session']} "
            f"({printable(reply['name'])}), which held {count(reply['held_pages'], 'page')}"
        )
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
        _state(session),
        session["held_pages"],
        session["writing_pages"],
        session["leased_pages"],
        session["running_requests"],
        session["waiting_requests"],
    ]


def _state(session: Reply) -> str:
    """Of one that has ended: since when, and what its pages wait for."""
    if session["ended_s_ago"] is None:
        return str(session["state"])
    waits = "process lives" if session["process"] == "living" else "grace"
    return f"{session['state']} {duration(session['ended_s_ago'])}, {waits}"


VERB = Verb(
    help="who is attached, and what they hold; kill ID ends one and its process",
    arguments=arguments,
    call=call,
    page=lambda reply, style, args: render(reply, style),
    role=lambda args: as_admin(args) if args.action else as_observer(args),
)
