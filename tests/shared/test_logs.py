import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from kvd_shared.logs import configure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore_structlog() -> Iterator[None]:
    before, handlers = structlog.get_config(), logging.root.handlers[:]
    yield
    structlog.configure(**before)
    logging.root.handlers[:] = handlers


def test_a_file_gets_one_json_object_a_line() -> None:
    stream = io.StringIO()
    configure("kvd", "info", "auto", stream)
    structlog.get_logger().info("pool.created", num_pages=64)
    structlog.get_logger().warning("evict.batch", pages=3)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("ts").endswith("Z")
    assert first == {"event": "pool.created", "level": "info", "svc": "kvd", "num_pages": 64}
    assert (second["level"], second["pages"]) == ("warning", 3)


def test_a_terminal_gets_text_and_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    configure("kvd", "info", "auto", coloured)
    structlog.get_logger().info("pool.created")
    monkeypatch.setenv("NO_COLOR", "1")
    configure("kvd", "info", "auto", plain)
    structlog.get_logger().info("pool.created")
    assert "pool.created" in coloured.getvalue() and "\x1b[" in coloured.getvalue()
    assert "pool.created" in plain.getvalue() and "\x1b[" not in plain.getvalue()


def test_lower_levels_are_silent() -> None:
    stream = io.StringIO()
    configure("kvd", "warning", "json", stream)
    structlog.get_logger().info("pool.created")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("level", ["info", "warning", "error", "exception"])
def test_prompts_are_not_written_above_debug(level: str) -> None:
    stream = io.StringIO()
    configure("kvd", "debug", "json", stream)
    log = structlog.get_logger()
    getattr(log, level)("request.done", tokens=[11, 12], prompt="my secret", num_tokens=2)
    log.debug("request.done", tokens=[11, 12])
    quiet, verbose = map(json.loads, stream.getvalue().splitlines())
    assert (quiet["tokens"], quiet["prompt"], quiet["num_tokens"]) == ("(private)", "(private)", 2)
    assert verbose["tokens"] == [11, 12]


@pytest.mark.parametrize("format", ["json", "console"])
def test_an_exception_is_shown_without_local_variables(format: str) -> None:
    """Local variables of a step are prompts."""
    stream = io.StringIO()
    configure("kvd", "info", format, stream)
    try:
        secret = "my " + "secret"
        raise RuntimeError(f"broken, {len(secret)} characters")
    except RuntimeError:
        structlog.get_logger().exception("step.failed")
    assert "broken, 9 characters" in stream.getvalue()
    assert "my secret" not in stream.getvalue()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="loud"):
        configure("kvd", "loud", "json", io.StringIO())


def test_what_libraries_log_is_an_event_too() -> None:
    stream = io.StringIO()
    configure("svc", "info", "json", stream)
    try:
        raise ValueError("inside a library")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("it went wrong")
    record = json.loads(stream.getvalue())
    assert record["event"] == "library.message"
    assert (record["logger"], record["message"]) == ("uvicorn.error", "it went wrong")
    assert "inside a library" in record["exception"]
