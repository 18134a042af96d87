"""`modelworker serve`: load the model, attach to kvd, answer HTTP until told to stop."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from kvd_shared.digest_cache import DigestCache, default_cache_dir
from kvd_shared.errors import KvdError
from kvd_shared.model_folder import BadModelFolder, model_fingerprint, weight_files
from kvd_shared.progress import progress_line
from modelworker.attachment import Attach, Attachment, attach
from modelworker.engine import WorkerEngine
from modelworker.engine_options import EngineOptions
from modelworker.http.app import create_app
from modelworker.http.server import serve as serve_http
from modelworker.http.service import ServedModel
from modelworker.manager import Manager
from modelworker.model import Model, load_model
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
    drain_timeout_s: float
    kvd_outage_s: float
    weights_version: int
    limits: Limits


def serve(options: ServeOptions) -> None:
    """Runs until SIGTERM or SIGINT, then finishes what was accepted. Raises KvdError where
    starting or attaching cannot succeed."""
    manager = Manager.from_environment(os.environ)
    model, fingerprint = _load(options.model, options.dtype)
    tokenizer = Tokenizer.from_folder(options.model)

    def attach_now() -> Attachment:
        return attach(options.socket_dir, options.name, model, fingerprint, options.pool)

    asked_to_stop: list[int] = []
    _on_signals(lambda: asked_to_stop.append(1))
    first = _until_attached(attach_now, asked_to_stop)
    if first is None:
        return
    context_len = min(options.max_model_len or sys.maxsize, model.config.context_length)
    engine = WorkerEngine(
        attach_now,
        tokenizer,
        EngineOptions(
            model=f"{fingerprint} {str(options.dtype).removeprefix('torch.')}",
            context_len=context_len,
            vocab_size=model.config.vocab_size,
            limits=options.limits,
            max_queued=options.max_queued,
            drain_timeout_s=options.drain_timeout_s,
            kvd_outage_s=options.kvd_outage_s,
            weights_version=options.weights_version,
        ),
        first,
        manager.alive,
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

    manager.ready(f"serving {options.served_model_name}")

    def stop() -> None:
        engine.stop()
        http.stop()

    _on_signals(stop)
    if asked_to_stop:  # while we were attaching
        stop()
    try:
        engine.run()
    finally:
        manager.stopping()
        http.stop()
        http.wait()
        log.info("worker.stopped", name=options.name)


def _load(folder: Path, dtype: torch.dtype) -> tuple[Model, str]:
    """The model and its fingerprint, of one and the same state of the folder."""
    before = [file.stat().st_mtime_ns for file in weight_files(folder)]
    with progress_line(sys.stderr, "digest of the weights") as progress:
        digests = DigestCache(default_cache_dir(os.environ))
        fingerprint = model_fingerprint(folder, progress, digests)
    with progress_line(sys.stderr, "loading the weights") as progress:
        model = load_model(folder, dtype, progress=progress)
    if before != [file.stat().st_mtime_ns for file in weight_files(folder)]:
        raise BadModelFolder(f"{folder}: a weight file was changed while it was read; start again")
    return model, fingerprint


def _until_attached(attach_now: Attach, asked_to_stop: list[int]) -> Attachment | None:
    """Wait for the daemon, which may start after its workers. None when told to stop."""
    told = False
    while not asked_to_stop:
        try:
            return attach_now()
        except KvdError as e:
            if not e.retryable:
                raise
            if not told:
                log.warning("kvd.awaited", reason=e.message)
                told = True
            time.sleep(ATTACH_RETRY_S)
    return None


def _on_signals(action: Callable[[], None]) -> None:
    """Call `action` at the first SIGTERM or SIGINT; a second one ends the process."""

    def signalled(number: int, frame: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        action()

    for number in STOP_SIGNALS:
        signal.signal(number, signalled)
