"""The `modelworker` command."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kvd_shared import exit_codes
from kvd_shared.errors import KvdError, LayoutMismatch, ProtocolMismatch, UnknownPool
from kvd_shared.mapping import BadPoolMemory
from kvd_shared.model_folder import BadModelFolder
from kvd_shared.namespace import MAX_VERSION
from kvd_shared.socket_dir import NoSocketDir, default_socket_dir

EXIT_CODES = f"""\
exit codes: {exit_codes.OK} ended as asked, {exit_codes.RUNTIME_ERROR} runtime error, \
{exit_codes.USAGE} usage, {exit_codes.INCOMPATIBLE} the pool is another model's or layout's,
{exit_codes.PROBLEM_FOUND} verify or the demo found a fault, \
{exit_codes.BAD_CONFIG} bad model folder
"""
SHIPPED_MODEL = Path(__file__).parent / "assets" / "tiny-quote"
SHIPPED_DOCUMENT = Path(__file__).parent / "assets" / "demo.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; wrong usage raises SystemExit(2)."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except (BadModelFolder, NoSocketDir) as e:
        return _fail(e, exit_codes.BAD_CONFIG)
    except (LayoutMismatch, UnknownPool, ProtocolMismatch, BadPoolMemory) as e:
        return _fail(e, exit_codes.INCOMPATIBLE)
    except (KvdError, OSError, UnicodeDecodeError) as e:
        return _fail(e, exit_codes.RUNTIME_ERROR)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), exit_codes.INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modelworker",
        description="A stateless model worker over pages that kvd owns.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="answer HTTP requests, over a daemon's pool"))
    _add_generate(commands.add_parser("generate", help="continue one prompt, without a daemon"))
    verify = commands.add_parser("verify", help="compare the paged path with a plain dense one")
    _add_model(verify)
    verify.set_defaults(run=_verify)
    demo = commands.add_parser("demo", help="a daemon and two workers quote a document, asserted")
    _add_demo(demo)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=SHIPPED_MODEL,
        metavar="DIR",
        help="a Hugging Face model folder (default: the tiny model that is shipped)",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="of torch on the CPU")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add = parser.add_argument
    add("--name", default=f"worker-{os.getpid()}", help="as kvdctl shows it")
    add("--socket-dir", type=Path, metavar="DIR", help="where kvd's sockets are")
    add("--pool", metavar="NAME", help="default: the only pool, or the one of this model")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--served-model-name", metavar="NAME", help="default: the folder's name")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="to compute in")
    add("--max-model-len", type=_positive, metavar="TOKENS", help="default: the model's context")
    add("--max-batch-tokens", type=_positive, default=512, metavar="N", help="computed a step")
    add("--max-seqs", type=_positive, default=32, metavar="N", help="running at once")
    add("--max-queued", type=_positive, default=1024, metavar="N", help="sequences that may wait")
    add("--no-wait", action="store_true", help="compute what another worker is computing, too")
    add("--weights-version", type=_version, default=0, metavar="N", help="raised with each update")
    add("--lease-ahead", type=_seconds, default=2.0, metavar="S", help="decode so long without kvd")
    add("--kvd-outage-s", type=_seconds, default=60.0, metavar="S", help="requests wait for kvd")
    add("--drain-timeout", type=float, default=30.0, metavar="S", help="after SIGTERM, seconds")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    add("--log-format", default="auto", choices=["auto", "json", "console"])
    parser.set_defaults(run=_serve)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add = parser.add_argument
    add("prompt", help="text, or - for standard input")
    add("--max-tokens", type=_positive, default=64, metavar="N")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--seed", type=int)
    add("--stop", action="append", default=[], metavar="TEXT", help="may be given repeatedly")
    parser.set_defaults(run=_generate)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--doc", type=Path, metavar="FILE", help="a text of your own")
    parser.set_defaults(run=_demo)


def _serve(args: argparse.Namespace) -> int:
    import torch

    from kvd_shared.logs import configure
    from modelworker.scheduler import Limits
    from modelworker.serve import ServeOptions, serve

    configure("modelworker", args.log_level, args.log_format, sys.stdout)
    _set_threads(args)
    serve(
        ServeOptions(
            model=args.model,
            name=args.name,
            socket_dir=args.socket_dir or default_socket_dir(os.environ),
            pool=args.pool,
            host=args.host,
            port=args.port,
            served_model_name=args.served_model_name or args.model.resolve().name,
            dtype=getattr(torch, args.dtype),
            max_model_len=args.max_model_len,
            max_queued=args.max_queued,
            drain_timeout_s=args.drain_timeout,
            kvd_outage_s=args.kvd_outage_s,
            weights_version=args.weights_version,
            limits=Limits(
                max_batch_tokens=args.max_batch_tokens,
                max_sequences=args.max_seqs,
                waits=not args.no_wait,
                lease_ahead_s=args.lease_ahead,
            ),
        )
    )
    return exit_codes.OK


def _generate(args: argparse.Namespace) -> int:
    import torch

    from modelworker.generate import generate
    from modelworker.model import load_model
    from modelworker.requests import SamplingParams
    from modelworker.tokenizer import Tokenizer

    _set_threads(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    model = load_model(args.model, torch.float32)
    for text in generate(model, Tokenizer.from_folder(args.model), prompt, params):
        print(text, end="", flush=True)
    print()
    return exit_codes.OK


def _verify(args: argparse.Namespace) -> int:
    from modelworker.verify import run_verify

    _set_threads(args)
    return run_verify(args.model, sys.stdout)


def _demo(args: argparse.Namespace) -> int:
    from modelworker.demo.processes import DemoFailed
    from modelworker.demo.story import run_demo

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    try:
        if args.doc is None:
            run_demo(SHIPPED_MODEL, SHIPPED_DOCUMENT)
        else:  # the model is tiny: it misquotes now and then, which is no fault of the cache
            run_demo(SHIPPED_MODEL, args.doc, least_right=3)
    except DemoFailed as e:
        return _fail(e, exit_codes.PROBLEM_FOUND)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("stopped; nothing is left behind"), exit_codes.INTERRUPTED)
    return exit_codes.OK


def _set_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 0")
    return value


def _version(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MAX_VERSION:
        raise argparse.ArgumentTypeError(f"{value}: must be from 0 to {MAX_VERSION}")
    return value


def _fail(error: BaseException, code: int) -> int:
    print(f"modelworker: {error}", file=sys.stderr)
    return code
