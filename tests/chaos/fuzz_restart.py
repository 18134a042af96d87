"""Faulty messages across a restart of the daemon: before a session has resumed, while it does, and
after."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from random import Random

from kvd_shared import verbs
from kvd_shared.errors import SessionEnded
from kvd_shared.resume import resume
from tests.chaos.fuzz_frames import Messages
from tests.chaos.fuzz_lease import LeaseFaults
from tests.chaos.world import ChaosDaemon

RESUME_FAULTS = 12  # one of them may be right by chance; then the session is over
EACH = 64  # messages of each kind
TIMEOUT_S = 20.0

Pipeline = Callable[[Iterator[list[bytes]]], Counter[str]]


class Restart:
    """One session, one kill of the daemon. `early_ok`: requests that were done before the session
    had declared what it holds."""

    def __init__(
        self,
        daemon: ChaosDaemon,
        rng: Random,
        new_dealer: Callable[[], AbstractContextManager[object]],
        pipeline: Pipeline,
    ) -> None:
        self.lease: Counter[str] = Counter()
        self.early_ok = self.resumed = 0
        self._daemon, self._rng = daemon, rng
        self._new_dealer, self._pipeline = new_dealer, pipeline

    def play(self, messages: Messages) -> None:
        daemon, worker = self._daemon, self._daemon.attach("mutant")
        assert worker.pool is not None
        codec = worker._codec
        messages.held = worker.call(verbs.allocate(9)).tolist()
        messages.request = worker.call(verbs.begin(3))
        with self._new_dealer():
            self._pipeline(messages.live(codec, codec) for _ in range(EACH))
        os.kill(daemon.served_by, signal.SIGKILL)
        daemon.until_ready()
        with self._new_dealer():
            early = self._pipeline(messages.live(codec, codec) for _ in range(EACH))
            self.early_ok += early["OK"]
            self._resume_faults(worker._token, worker.pool.pool_id, codec.epoch)
            try:
                connection, codec.epoch = resume(
                    daemon.socket_dir, worker.session, worker._token, codec.epoch, worker.pool,
                    TIMEOUT_S,
                )  # fmt: skip
            except SessionEnded:
                worker.close()
                return
            self.resumed += 1
            with connection:
                strange = [self._rng.randrange(40), 41, 2**40 + 3, -1]
                self._pipeline(messages.declaring(codec, strange) for _ in range(EACH))
                last = verbs.declare(messages.held, [1] * len(messages.held))
                self._pipeline(iter([codec.request(last)[1]]))
                self._pipeline(messages.live(codec, codec) for _ in range(EACH))
                worker.close()

    def _resume_faults(self, token: bytes, pool_id: str, epoch: int) -> None:
        faults = LeaseFaults(self._rng, self._daemon.socket_dir, b"", (token, pool_id, epoch))
        for _ in range(RESUME_FAULTS):
            self.lease[f"resume: {faults.one()}"] += 1
