"""`modelworker serve`: load the model, attach to kvd, answer HTTP until told to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from kvd_shared.errors import KvdError
from kvd_shared.model_folder import model_fingerprint
from kvd_shared.progress import progress_line
from modelworker.attachment import Attach, Attachment, attach
from modelworker.engine import EngineOptions, WorkerEngine
from modelworker.http.app import create_app
from modelworker.http.server import serve as serve_http
from modelworker.http.service import ServedModel
from modelworker.model import load_model
from modelworker.scheduler import Limits
from modelworker.tokenizer import Tokenizer

ATTACH_RETRY_S = 0.2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the command line says."""

    model: Path
    name: str
    socket_dir: Path
    pool: str | None
    host: str
    port: int
    served_model_name: str
    dtype: torch.dtype
    max_model_len: int | None
    max_queued: int
    limits: Limits


def serve(options: ServeOptions) -> None:
    """Runs until SIGTERM or SIGINT, then finishes what was accepted. Raises KvdError where
    starting or attaching cannot succeed."""
    with progress_line(sys.stderr, "digest of the weights") as progress:
        fingerprint = model_fingerprint(options.model, progress)
    with progress_line(sys.stderr, "loading the weights") as progress:
        model = load_model(options.model, options.dtype, progress=progress)
    tokenizer = Tokenizer.from_folder(options.model)

    def attach_now() -> Attachment:
        return attach(options.socket_dir, options.name, model, fingerprint, options.pool)

    stopped = threading.Event()
    _on_signals(stopped.set)
    first = _until_attached(attach_now, stopped)
    if first is None:
        return
    context_len = min(options.max_model_len or sys.maxsize, model.config.context_length)
    engine = WorkerEngine(
        attach_now,
        tokenizer,
        EngineOptions(
            model=fingerprint,
            context_len=context_len,
            vocab_size=model.config.vocab_size,
            limits=options.limits,
            max_queued=options.max_queued,
        ),
        first,
    )
    served = ServedModel(
        id=options.served_model_name,
        tokenizer=tokenizer,
        context_len=min(context_len, first.pool_tokens),
    )
    http = serve_http(
        create_app(engine, served),
        options.host,
        options.port,
        on_ready=lambda url: log.info("worker.ready", name=options.name, url=url),
    )

    def stop() -> None:
        engine.stop()
        http.stop()

    _on_signals(stop)
    if stopped.is_set():  # asked while we were attaching
        stop()
    try:
        engine.run()
    finally:
        http.stop()
        http.wait()
        log.info("worker.stopped", name=options.name)


def _until_attached(attach_now: Attach, stopped: threading.Event) -> Attachment | None:
    """Wait for the daemon, which may start after its workers. None when told to stop."""
    told = False
    while not stopped.is_set():
        try:
            return attach_now()
        except KvdError as e:
            if not e.retryable:
                raise
            if not told:
                log.warning("kvd.awaited", reason=e.message)
                told = True
            stopped.wait(ATTACH_RETRY_S)
    return None


def _on_signals(action: Callable[[], None]) -> None:
    """Call `action` at the first SIGTERM or SIGINT; a second one ends the process."""

    def signalled(number: int, frame: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        action()

    for number in STOP_SIGNALS:
        signal.signal(number, signalled)
