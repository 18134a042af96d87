"""A daemon without process and sockets, which dies and starts when the test says so, and its
clients."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from kvd.arguments import Arguments
from kvd.cache import NO_OPTIONS, CacheManager
from kvd.cache_check import check_cache
from kvd.metadata import Metadata
from kvd.operations import step
from kvd.options import CacheOptions
from kvd.recovery import Recovery, recover
from kvd.session import Session
from kvd_shared.calls import Call
from kvd_shared.errors import DaemonTimeout, DaemonUnreachable, PoolLost
from kvd_shared.refs import PageRefs, refs_from_bytes
from kvd_shared.rpc import Notice
from kvd_shared.wire import FrameWriter
from tests.kvd.metadata.test_tables import copy as copy_metadata
from tests.kvd.metadata.worlds import process, small_metadata

T = TypeVar("T")
NOTHING = -1  # in a slot that nobody has written


class Host:
    """A pool whose slots hold tokens in place of K and V, and its daemon: a cache that can die at
    any operation, and start again from its metadata or from nothing.

    `dies_in`: after so many operations more. `slow_in`: the answer to that call from now comes
    only when it has been asked for again `slow_for` times.
    """

    def __init__(self, num_pages: int, page_size: int, options: CacheOptions = NO_OPTIONS) -> None:
        self.num_pages, self.page_size, self.options = num_pages, page_size, options
        self.clients: list[Client] = []
        self.num_starts = 0
        self.is_up = False
        self.dies_in: int | None = None
        self.slow_in: int | None = None
        self.slow_for = 1
        self.cache: CacheManager
        self.start(cold=True)

    def start(self, *, cold: bool = False) -> None:
        now = time.monotonic()
        self.dies_in = None
        if cold:
            self.pool_id = f"{self.num_starts:016x}"
            self.slots = np.full((self.num_pages, self.page_size), NOTHING, dtype=np.int64)
            meta: Metadata = small_metadata(self.num_pages, self.page_size)
        else:
            meta = copy_metadata(self.cache.meta)
        self.cache = CacheManager(self.num_pages, self.page_size, self.options, meta)
        self.recovery: Recovery | None = None if cold else recover(self.cache, now, 1e9)
        self._refs = self._current()  # each page's, when it was last looked
        self.num_starts += 1
        self.is_up = True
        if not cold:
            self._bury_the_closed(now)
        self.check()

    def kill(self) -> None:
        self.is_up = False

    def end_grace(self) -> None:
        """Whoever has not resumed by now is fenced."""
        if self.recovery is not None:
            for session in self.recovery.end_grace(time.monotonic()):
                self.of_session(session).fenced = True
            self.sweep()

    def client(self, name: str) -> Client:
        """A session of its own."""
        self.clients.append(Client(self, len(self.clients) + 1, name))
        return self.clients[-1]

    def of_session(self, session_id: int) -> Client:
        return self.clients[session_id - 1]

    def sweep(self) -> None:
        while self.cache.sweep(time.monotonic()):
            pass
        self.spoil_freed()
        self.pass_on_notices()

    def _bury_the_closed(self, now: float) -> None:
        """Those that have unmapped the pool while there was no daemon."""
        assert self.recovery is not None
        for session_id in [*self.recovery.waiting, *self.recovery.ended]:
            if self.of_session(session_id).closed:
                self.recovery.dead(self.cache.sessions[session_id], now)
        self.sweep()

    def spoil_freed(self) -> None:
        """A page that became free is somebody else's, for all that its last holder can know."""
        refs = self._current()
        self.slots[refs != self._refs] = NOTHING
        self._refs = refs

    def _current(self) -> npt.NDArray[np.int64]:
        current = self.cache.free_list.current
        return np.array([current(page) for page in range(self.num_pages)])

    def pass_on_notices(self) -> None:
        notices, self.cache.notices = self.cache.notices, []
        for kind, request, tokens in notices:
            for client in self.clients:
                if client.session is request.session:
                    client.noticed.append(Notice(kind, request.number, tokens))

    def check(self) -> None:
        check_cache(self.cache)


class Client:
    """Stands for KvdClient; `calls` counts the operations by name."""

    def __init__(self, host: Host, number: int, name: str) -> None:
        self.noticed: deque[Notice] = deque()
        self.calls: Counter[str] = Counter()
        self.fenced = self.closed = False
        self.refuses: set[int] = set()  # though it could have them
        self._host = host
        self._number = number
        self._start, self._pool_id = host.num_starts, host.pool_id
        self._late: tuple[int, Any] | None = None  # an answer that was not waited for
        self._seq = self._asked_again = 0
        self.session: Session = host.cache.open_session(number, name, 0.0, process(number))

    @property
    def alive(self) -> bool:
        return self._host.is_up and self._host.num_starts == self._start and not self.closed

    def call(self, call: Call[T], timeout_s: float = 5.0, *, seq: int | None = None) -> T:
        """A step, through its wire form."""
        if not self.alive:
            raise DaemonUnreachable("the daemon is gone")
        self._seq += seq is None
        if seq is not None and self._late is not None:
            assert self._late[0] == seq
            self._asked_again += 1
            if self._asked_again < self._host.slow_for:
                raise DaemonTimeout("the daemon is slow", seq=seq)
            late, self._late = self._late[1], None
            return cast(T, late)
        answer = self._perform(call)
        if self._host.slow_in is not None:
            self._host.slow_in -= 1
            if self._host.slow_in < 0:
                self._host.slow_in = None
                self._late, self._asked_again = (self._seq, answer), 0
                raise DaemonTimeout("the daemon is slow", seq=self._seq)
        return answer

    def _perform(self, call: Call[T]) -> T:
        writer = FrameWriter()
        wire = call.to_wire(writer)
        frames = [b"", *writer.frames]
        calls = wire["args"]["calls"]
        dies_in, self._host.dies_in = self._host.dies_in, None
        if dies_in is not None:
            if len(calls) >= dies_in:
                del calls[dies_in:]
            else:
                self._host.dies_in, dies_in = dies_in - len(calls), None
        self.calls.update(entry["op"] for entry in calls)
        args, now = Arguments("step", wire["args"], frames), time.monotonic()
        slices = step(self._host.cache, self.session, args, frames, now)
        while True:
            try:
                next(slices)
            except StopIteration as end:
                results = end.value["results"]
                break
        self._host.spoil_freed()
        self._host.pass_on_notices()
        if dies_in is not None:
            self._host.kill()
            raise DaemonUnreachable("the daemon died")
        return call.read({"results": results}, [b""])

    def resume(self, refs: PageRefs, counts: npt.NDArray[np.int32], timeout_s: float = 5.0) -> Any:
        assert not self.alive
        host = self._host
        if not host.is_up:
            raise DaemonUnreachable("there is no daemon")
        if host.pool_id != self._pool_id:
            raise PoolLost("the daemon has started cold")
        assert host.recovery is not None
        self.session = host.recovery.resume(self._number)
        self._start = host.num_starts
        self.noticed.clear()
        has = ~np.isin(refs, list(self.refuses))
        args = refs[has].tobytes(), counts[has].astype("<i4").tobytes(), True
        refused = host.recovery.declare(self.session, *args, time.monotonic())
        host.sweep()
        return np.concatenate([refs_from_bytes(refused), refs[~has]])

    def notices(self) -> list[Notice]:
        taken = list(self.noticed)
        self.noticed.clear()
        return taken

    def close(self) -> None:
        """The pool is unmapped: everything that the session holds comes back, as when its process
        dies."""
        if self.closed:
            return
        self.closed = True
        host, now = self._host, time.monotonic()
        session = host.cache.sessions.get(self._number)
        if not host.is_up or host.pool_id != self._pool_id or session is None:
            return
        if host.recovery is not None:
            host.recovery.dead(session, now)
        else:
            host.cache.release_session(session)
        host.sweep()
