"""The `kvd` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvd import __version__
from kvd_shared import exit_codes

EXIT_CODES = f"""\
exit codes: {exit_codes.OK} ended as asked, {exit_codes.RUNTIME_ERROR} runtime error, \
{exit_codes.USAGE} usage, {exit_codes.IN_USE} another kvd owns the sockets,
{exit_codes.BAD_CONFIG} bad configuration (restarting does not help)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; wrong usage raises SystemExit(2)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(arguments)
    args.arguments = arguments
    code: int = args.run(args)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvd",
        description="A daemon that owns the KV cache pages of a device and shares them between "
        "model workers.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    version = commands.add_parser("version", help="print the version and the protocol's")
    version.set_defaults(run=_version)
    serve = commands.add_parser(
        "serve",
        help="run the daemon",
        description="Run the daemon in the foreground until SIGTERM. Flags win over the "
        "environment (KVD_DAEMON__LOG_LEVEL, KVD_POOL__0__SIZE), which wins over the file.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(run=_serve)
    serve.add_argument(
        "--no-keeper",
        action="store_true",
        help="without a service manager: no parent process that keeps the memory and restarts the "
        "daemon; the cache then ends with it",
    )
    serve.add_argument(
        "--max-restarts",
        type=_count,
        default=10,
        metavar="N",
        help="crashes within a minute after which the keeper gives up (default: 10)",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="a TOML file")
    for flag, (metavar, text) in SERVE_FLAGS.items():
        serve.add_argument(flag, dest=flag, metavar=metavar, help=text)
    return parser


SERVE_FLAGS = {
    "--socket-dir": ("DIR", "where the sockets are (default: /run/kvd or $XDG_RUNTIME_DIR/kvd)"),
    "--log-level": ("LEVEL", "debug, info, warning or error"),
    "--log-format": ("FORMAT", "auto, json or console"),
    "--max-sessions": ("N", "processes attached at once, over all pools (default: 1024)"),
    "--model": ("DIR", "the pool's model folder, which says its layout"),
    "--layout": ("LAYOUT", "instead of a model: num_layers=2,num_kv_heads=2,head_dim=32"),
    "--pool-name": ("NAME", "default: the model folder's name"),
    "--pool-size": ("SIZE", "256MiB, 4096 pages (default: 256MiB)"),
    "--page-size": ("TOKENS", "tokens a page, a power of two from 8 to 256 (default: 16)"),
    "--kv-dtype": ("DTYPE", "auto, float32, bfloat16 or float16 (default: auto)"),
    "--policy": ("NAME", "which cached pages go first (default: lru)"),
    "--operator-quota": ("SHARE", "of the pool that retain may keep, 0 to 1 (default: 0.25)"),
    "--ttl-s": ("SECONDS", "unused KV is matched no more after so long (default: no end)"),
    "--limits": ("LIMITS", "of one client: max_prompt_tokens=32768,max_pages_a_session=4096"),
    "--events": ("EVENTS", "publish KV events: endpoint=tcp://127.0.0.1:5557,hwm=100000"),
}


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 0")
    return int(text)


def _version(args: argparse.Namespace) -> int:
    from kvd_shared.wire import PROTOCOL_VERSION

    print(f"kvd {__version__}, protocol {PROTOCOL_VERSION}")
    return exit_codes.OK


def _serve(args: argparse.Namespace) -> int:
    """Under a service manager, or the keeper, this process is the daemon; else it is the keeper."""
    if os.environ.get("NOTIFY_SOCKET") or args.no_keeper:
        return _daemon(args)
    from kvd.keeper import keep

    return keep(args.arguments, args.max_restarts)


def _daemon(args: argparse.Namespace) -> int:
    with _left_out("rich"):
        import structlog  # noqa: F401
    from kvd.config import load_config
    from kvd.config_error import ConfigError
    from kvd.lockfile import AlreadyRunning
    from kvd.page_pool import PoolTooLarge
    from kvd_shared.logs import configure
    from kvd_shared.model_folder import BadModelFolder

    flags = {flag: getattr(args, flag) for flag in SERVE_FLAGS if getattr(args, flag) is not None}
    try:
        config = load_config(args.config, os.environ, flags)
        configure("kvd", config.daemon.log_level, config.daemon.log_format, sys.stdout)
        from kvd.server import serve

        return serve(config)
    except (ConfigError, BadModelFolder) as e:
        return _fail(e, exit_codes.BAD_CONFIG)
    except AlreadyRunning as e:
        return _fail(e, exit_codes.IN_USE)
    except (PoolTooLarge, OSError) as e:
        return _fail(e, exit_codes.RUNTIME_ERROR)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), exit_codes.INTERRUPTED)


@contextmanager
def _left_out(module: str) -> Iterator[None]:
    """Not to be imported meanwhile, though it may be installed. structlog takes rich where it finds
    it, for tracebacks that kvd does not print: a sixth of the CPU time of a start."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _fail(error: BaseException, code: int) -> int:
    print(f"kvd: {error}", file=sys.stderr)
    return code
