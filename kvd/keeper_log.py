"""The keeper's few log lines, in the form of the daemon's own (kvd_shared/logs.py) without what
that would have to import."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime


def say(event: str, **keys: object) -> None:
    """One warning. Text where the log goes to a terminal, else a line of JSON. A reader that is
    gone is no reason to end."""
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    line = {"ts": when, "level": "warning", "svc": "kvd-keeper", "event": event} | keys
    if os.isatty(1):
        text = f"kvd keeper: {event} " + " ".join(f"{k}={v}" for k, v in keys.items())
    else:
        text = json.dumps(line)
    with suppress(OSError):
        os.write(1, text.encode() + b"\n")
