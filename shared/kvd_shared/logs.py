"""Logs are events with keys: JSON lines for machines, coloured text on a terminal.

Every line has `event`, `ts` (UTC), `level` and `svc`. Prompts are private: token ids and text
are dropped from anything above debug.
"""

from __future__ import annotations

import logging
import os
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "console")
PRIVATE_KEYS = frozenset({"tokens", "token_ids", "text", "prompt", "completion", "messages"})


def configure(service: str, level: str, format: str, stream: TextIO) -> None:
    """Set up structlog for this process; `structlog.get_logger()` anywhere uses it.

    `format` "auto" is console where `stream` is a terminal, else json. Raises ValueError for a
    level or format that is not in LEVELS or FORMATS.
    """
    if level not in LEVELS or format not in FORMATS:
        raise ValueError(f"level {level!r} of {LEVELS}, format {format!r} of {FORMATS}")
    is_terminal = stream.isatty()
    render = _json if format == "json" or (format == "auto" and not is_terminal) else _console
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            _service(service),
            drop_private,
            *render(colors=is_terminal and not os.environ.get("NO_COLOR")),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,  # so that a second call (a reload) reaches all loggers
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_FromLibraries()], force=True)


class _FromLibraries(logging.Handler):
    """What libraries log by the standard way becomes an event like all others."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno,
            "library.message",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def drop_private(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Replaces the values of PRIVATE_KEYS by a mark, unless the event is a debug one."""
    if event.get("level") != "debug":
        for key in PRIVATE_KEYS & event.keys():
            event[key] = "(private)"
    return event


def _service(name: str) -> Processor:
    def add(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        event["svc"] = name
        return event

    return add


def _json(colors: bool) -> list[Processor]:
    return [
        structlog.processors.format_exc_info,
        _common_keys_first,
        structlog.processors.JSONRenderer(default=repr, ensure_ascii=False),
    ]


def _common_keys_first(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {key: event.pop(key) for key in ("ts", "level", "svc", "event")} | dict(event)


def _console(colors: bool) -> list[Processor]:
    # the default for exceptions shows local variables, which may be prompts
    plain = structlog.dev.plain_traceback
    return [
        structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="ts", exception_formatter=plain)
    ]
