"""Reads a trace of requests, in the JSON lines that Mooncake published its own in.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}

`timestamp` is in milliseconds; `hash_ids` names the prompt's blocks of 512 tokens, each together
with all before it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.benchmarks.trace.request import Request, Trace


class TraceError(ValueError):
    """A file that is no trace: says which line and field, and what should be there."""


def read_trace(path: Path) -> Trace:
    """Blocks are numbered anew, in the order of their first appearance."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; name a trace with TRACE=file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise TraceError(f"{path}: cannot be read as text: {e}") from e
    numbers: dict[int, int] = {}
    before: dict[int, int | None] = {}  # the block that each block follows
    requests: Trace = []
    for number, line in enumerate(lines, 1):
        try:
            at_s, ids = _fields(line)
            if requests and at_s < requests[-1].at_s:
                raise TraceError(f"field timestamp: {at_s * 1000:g} is before the line above")
            last: int | None = None
            for block in ids:
                if before.setdefault(block, last) != last:
                    raise TraceError(
                        f"field hash_ids: block {block} follows {last} here and "
                        f"{before[block]} before; a block stands for all before it, too"
                    )
                last = block
        except TraceError as e:
            raise TraceError(f"{path}, line {number}: {e}") from None
        blocks = tuple([numbers.setdefault(block, len(numbers)) for block in ids])
        requests.append(Request(at_s, blocks))
    if not requests:
        raise TraceError(f"{path}: it has no requests")
    return requests


def _fields(line: str) -> tuple[float, list[int]]:
    try:
        record: Any = json.loads(line)
    except ValueError as e:
        raise TraceError(f"not JSON: {e}") from None
    if not isinstance(record, dict):
        raise TraceError(f"a {type(record).__name__}, not an object with timestamp and hash_ids")
    for name in ("timestamp", "input_length", "output_length"):
        value: Any = record.get(name)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise TraceError(f"field {name}: {value!r} is not a number from 0 up")
    ids = record.get("hash_ids")
    if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
        raise TraceError("field hash_ids: not a list of whole numbers from 0 up")
    if not ids:
        raise TraceError("field hash_ids: no blocks; a prompt has at least one")
    return record["timestamp"] / 1000, ids
