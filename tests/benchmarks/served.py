"""A daemon process with a large pool of tiny pages, filled with cached documents over ZeroMQ."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvd_shared import verbs
from kvd_shared.calls import Call
from kvd_shared.client import KvdClient
from kvd_shared.namespace import Namespace
from tests.benchmarks.workload import DOCUMENT_PAGES, NAMESPACE, PAGE_SIZE, Tokens
from tests.daemon import RunningDaemon, running_daemon

A_STEP = 32  # documents


@contextmanager
def served(tmp_path: Path, num_pages: int) -> Iterator[RunningDaemon]:
    """A page has 64 bytes: what is measured is the cache, not the memory that it manages."""
    with running_daemon(tmp_path, num_pages=num_pages, head_dim=1, kv_dtype="bfloat16") as daemon:
        yield daemon


def store(
    client: KvdClient,
    documents: list[bytes],
    namespace: Namespace = NAMESPACE,
    retention: verbs.Retention | None = None,
) -> None:
    """Documents of whole pages, each in the cache afterwards and held by nobody."""
    arrays = [np.frombuffer(document, dtype="<i4") for document in documents]
    acquire = [verbs.acquire(namespace, a, len(a) // PAGE_SIZE) for a in arrays]
    todo: list[Call[Any]] = []
    for tokens, found in zip(arrays, _done(client, acquire), strict=True):
        todo.append(verbs.publish(namespace, tokens, found.refs, retention=retention))
        todo.append(verbs.free(found.refs))
    _done(client, todo)


def fill(
    client: KvdClient,
    num_pages: int,
    seed: int,
    namespace: Namespace = NAMESPACE,
    retention: verbs.Retention | None = None,
) -> None:
    """So many pages of cached documents: those of `documents(seed, …)`."""
    some: list[bytes] = []
    for document in documents(seed, num_pages // DOCUMENT_PAGES):
        some.append(document)
        if len(some) == A_STEP:
            store(client, some, namespace, retention)
            some = []
    store(client, some, namespace, retention)


def documents(seed: int, count: int) -> Iterator[bytes]:
    tokens = Tokens(seed)
    return (tokens.pages(DOCUMENT_PAGES) for _ in range(count))


def _done(client: KvdClient, calls: list[Call[Any]]) -> list[Any]:
    results = client.call(verbs.step(calls))
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def cpu_ns(pid: int) -> int:
    """CPU time of a whole process: the clock that Linux has for each (see clock_getcpuclockid)."""
    return time.clock_gettime_ns((~pid << 3) | 2)
