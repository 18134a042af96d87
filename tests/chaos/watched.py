"""`python -m tests.chaos.watched OUT ARGUMENTS…`: `kvd ARGUMENTS…` that looks at itself.

All that a refused request must leave as it is, is compared before and after every single one; OUT
gets a line of JSON for each that has changed something, and for each error that only a bug makes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

import msgpack

from kvd import keeper, rpc_server
from kvd.cache import CacheManager
from kvd.cli import main as kvd_main
from kvd_shared.errors import KvdError
from tests.integration.mutated_frames import fingerprint

REMEMBERED = 20_000
ANY_NUMBER = 1_000_000  # of restarts


def watch(path: str) -> None:
    out = open(path, "a", buffering=1)  # noqa: SIM115 - to the process's end
    server: Any = rpc_server.RpcServer
    answer = server._answer
    done: dict[Any, None] = {}  # requests that were done, by session, epoch and number

    def watched(self: Any, route: bytes, peer: Any, frames: list[bytes]) -> list[bytes] | None:
        caches = [pool.cache for pool in self._daemon.pools.values()]
        before = [_all_of(cache) for cache in caches]
        reply: list[bytes] | None = answer(self, route, peer, frames)
        if reply is None:
            return reply
        error = msgpack.unpackb(reply[0]).get("error")
        number = _number(frames)
        if error is None and number not in done:
            done[number] = None
            if len(done) > REMEMBERED:
                del done[next(iter(done))]
            return reply
        what = None
        if error is not None and error["code"] == KvdError.code:
            what = "a bug was met"
        if [_all_of(cache) for cache in caches] != before:
            what = "a request was done twice" if error is None else (
                "a refused request has changed something"
            )  # fmt: skip
        if what is not None:
            found = {"what": what, "error": error, "frames": [f.hex() for f in frames]}
            out.write(json.dumps(found, default=str) + "\n")
        return reply

    server._answer = watched


def _all_of(cache: CacheManager) -> Any:
    pages = cache.meta.pages
    return fingerprint(cache), pages.current.tobytes(), pages.owner.tobytes()


def _number(frames: list[bytes]) -> Any:
    try:
        header = msgpack.unpackb(frames[0], strict_map_key=False)
        return header["session"], header["epoch"], header["seq"]
    except Exception:
        return object()


def main() -> int:
    """A daemon, or the keeper of one like this."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: with the run that started it
    if "NOTIFY_SOCKET" not in os.environ:
        again = [sys.executable, "-m", "tests.chaos.watched", *sys.argv[1:]]
        return keeper.Keeper(again, ANY_NUMBER, keeper.WATCHDOG_S).run()
    watch(sys.argv[1])
    return kvd_main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
