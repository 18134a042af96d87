"""The command line of `kvdctl`. Imports the client only once there is something to ask."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kvd import __version__
from kvd.admin import (
    audit,
    evict,
    explain,
    flush,
    pages,
    raise_weights_version,
    release,
    retain,
    retained,
    sessions,
    status,
    tree,
    who_holds,
)
from kvd.admin.style import Style
from kvd.admin.verb import Reply, UsageError, Verb, seconds
from kvd_shared import exit_codes

SCHEMA = "kvd/v1"
VERBS: dict[str, Verb] = {
    "status": status.VERB,
    "pages": pages.VERB,
    "tree": tree.VERB,
    "sessions": sessions.VERB,
    "who-holds": who_holds.VERB,
    "explain": explain.VERB,
    "audit": audit.VERB,
    "evict": evict.VERB,
    "flush": flush.VERB,
    "raise-weights-version": raise_weights_version.VERB,
    "retain": retain.VERB,
    "retained": retained.VERB,
    "release": release.VERB,
}
EXIT_CODES = f"""\
exit codes: {exit_codes.OK} ok, {exit_codes.RUNTIME_ERROR} runtime error, \
{exit_codes.USAGE} usage, {exit_codes.UNREACHABLE} daemon unreachable, \
{exit_codes.NOT_FOUND} not found, {exit_codes.TIMEOUT} timeout, \
{exit_codes.INCOMPATIBLE} another protocol version, \
{exit_codes.PROBLEM_FOUND} audit found a fault, {exit_codes.BAD_CONFIG} no socket folder known
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; wrong usage raises SystemExit(2)."""
    args = _parser().parse_args(argv)
    verb = VERBS[args.verb]
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # it is a TextIOWrapper
    try:
        code, reply = _ask(verb, args)
        if reply is not None:
            print(_shown(verb, reply, args), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        _write_no_more()
        return exit_codes.OK
    except OSError as e:  # a full disk
        _write_no_more()
        return _fail(f"cannot write the answer: {e.strerror}", exit_codes.RUNTIME_ERROR)
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    return code


def _write_no_more() -> None:
    """Without this the interpreter's own flush would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvdctl",
        description="Looks at a running kvd, and changes what it keeps.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvdctl {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-o", dest="output", choices=("table", "json"), default="table", help="default: table"
    )
    common.add_argument(
        "--socket-dir",
        type=Path,
        metavar="DIR",
        help="the daemon's sockets (default: $KVD_SOCKET_DIR, /run/kvd or $XDG_RUNTIME_DIR/kvd)",
    )
    common.add_argument(
        "--timeout", type=seconds, default=5.0, metavar="S", help="in seconds (default: 5)"
    )
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        own = commands.add_parser(
            name,
            help=verb.help,
            description=verb.help,
            epilog=EXIT_CODES,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.arguments(own)
    return parser


def _ask(verb: Verb, args: argparse.Namespace) -> tuple[int, Reply | None]:
    """The exit code, and the daemon's reply if there is one; errors are told on stderr."""
    from kvd_shared.client import KvdClient
    from kvd_shared.errors import (
        DaemonTimeout,
        DaemonUnreachable,
        KvdError,
        ProtocolMismatch,
        UnknownHandle,
        UnknownPool,
    )
    from kvd_shared.socket_dir import NoSocketDir, default_socket_dir

    try:
        directory = args.socket_dir or default_socket_dir(os.environ)
        request = verb.call(args) if verb.look is None else None  # wrong usage needs no daemon
    except NoSocketDir as e:
        return _fail(e, exit_codes.BAD_CONFIG), None
    except UsageError as e:
        return _fail(e, exit_codes.USAGE), None
    try:
        with KvdClient.attach(
            directory, name="kvdctl", role=verb.role(args), timeout_s=args.timeout
        ) as client:
            if verb.look is not None:
                args.seen = client.call(verb.look(args), args.timeout)
                request = verb.call(args)
            assert request is not None
            reply = client.call(request, args.timeout)
            return verb.code(reply), reply
    except UsageError as e:
        return _fail(e, exit_codes.USAGE), None
    except DaemonTimeout as e:
        return _fail(e, exit_codes.TIMEOUT), None
    except DaemonUnreachable as e:
        return _fail(e, exit_codes.UNREACHABLE), None
    except ProtocolMismatch as e:
        return _fail(e, exit_codes.INCOMPATIBLE), None
    except (UnknownPool, UnknownHandle) as e:
        return _fail(e, exit_codes.NOT_FOUND), None
    except KvdError as e:
        return _fail(e, exit_codes.RUNTIME_ERROR), None


def _shown(verb: Verb, reply: Reply, args: argparse.Namespace) -> str:
    if args.output == "json":
        return json.dumps({"schema": SCHEMA, **verb.json(reply)})
    return verb.page(reply, Style.of(sys.stdout, os.environ), args)


def _fail(error: Exception | str, code: int) -> int:
    print(f"kvdctl: {error}", file=sys.stderr)
    return code
