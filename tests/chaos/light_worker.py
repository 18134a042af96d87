"""A worker without a model: the real client, mapping and protocol, with written patterns for KV.

It computes sequences of a `Universe` as an engine would: matches a prompt, takes pages for the
rest, writes them, publishes what is full, grows page by page, forks, hands sequences to other
workers, heeds the duty to yield, frees. What it reads it verifies; what it does it notes.

Signals: TERM: give everything back, detach and end. USR1: write NAME.holds at the next step
boundary and stand still until the next USR1. USR2: close the lease connection and live on a while.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Any

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import DaemonUnreachable, KvdError, SessionEnded
from tests.chaos.content import PAGE_SIZE, Path
from tests.chaos.history import Counter, History, Kind
from tests.chaos.ledger import Ledger
from tests.chaos.resuming import resume
from tests.chaos.sequence import Fenced, Pages
from tests.chaos.tickets import Tickets
from tests.chaos.work import Options, Work

SETTLED_S = 0.3  # by then the daemon has seen the end of a connection


class LightWorker(Work):
    """One attached worker: its session, its signals, its end."""

    def __init__(self, options: Options) -> None:
        folder = FilePath(options.folder)
        super().__init__(options, History(folder, options.name), Tickets(folder, options.name))
        self.ending = self.cut = False
        self._holds_asked = 0
        self._attach()

    def _attach(self) -> None:
        self.client = KvdClient.attach(FilePath(self.options.socket_dir), name=self.options.name)
        assert self.client.pool is not None
        self.pool_id = self.client.pool.pool_id
        self.history.count(Counter.ATTACHED)
        numbered = int(self.pool_id, 16) >> 1  # as it fits a record
        self.history.note(Kind.ATTACHED, [numbered], self.client.session)
        self.history.flush()
        self.ledger = Ledger(self.history)
        self.pages = Pages(self.client, self.universe, self.history)

    # --- the loop

    def run(self) -> None:
        """Until SIGTERM, or a cut."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "ending", True))
        signal.signal(signal.SIGUSR1, lambda *_: self._ask_for_holds())
        signal.signal(signal.SIGUSR2, lambda *_: setattr(self, "cut", True))
        while not self.ending:
            try:
                self._step_or_resume()
            except Fenced:
                self._note_fence()
                self.start_anew()
            if self._holds_asked % 2:
                self._stand_still()
            if self.cut:
                self._cut_and_end()
        self.give_back()

    def _step_or_resume(self) -> None:
        """Raises Fenced."""
        try:
            self.step()
        except SessionEnded:
            self.pages.look_at_fence()
            self.start_anew()
        except DaemonUnreachable:
            self.history.note(Kind.DAEMON_GONE, [0])
            self.history.flush()
            if not resume(self):
                self.pages.look_at_fence()
                self.start_anew()

    # --- the end, and what comes instead of it

    def give_back(self) -> None:
        """All pages, all requests, then the session."""
        with suppress(Fenced):
            for sequence in self.sequences:
                self.pages.verify(sequence, "pages held to the end")
        self.ledger.lost()
        self.history.flush()
        self.client.close()

    def start_anew(self) -> None:
        """The session is over. What it held is lost; its requests begin again from their tokens."""
        self.ledger.lost()
        self.history.flush()
        self.client.close()
        for some in (self.sequences, self.later, self.ends):
            some.clear()
        while not self.ending:
            try:
                self._attach()
                return
            except KvdError as e:
                if not e.retryable:
                    raise
                time.sleep(0.02)

    def _note_fence(self) -> None:
        self.history.count(Counter.FENCED)
        self.history.note(Kind.FENCED, [int(self.pages.unfenced_s * 1e9)])

    def _ask_for_holds(self) -> None:
        self._holds_asked += 1

    def _stand_still(self) -> None:
        """What this worker holds, by its own account, for the checker to compare."""
        holds = {"session": self.client.session, "holds": dict(self.ledger.holds)}
        path = FilePath(self.options.folder) / f"{self.options.name}.holds"
        path.with_suffix(".new").write_text(json.dumps(holds))
        path.with_suffix(".new").rename(path)
        while self._holds_asked % 2 and not self.ending:
            time.sleep(0.005)

    def _cut_and_end(self) -> None:
        """Close the lease connection in one of three ways, go on reading and writing, and see that
        nothing is answered any more. Then the process ends, which is what gives the pages back."""
        self.history.note(Kind.CUT, [0])
        self.history.flush()
        self.pages.heeds_fence = not self.options.daemon_stays
        connection = self.client._connection
        match self.rng.randrange(3):
            case 0:
                connection.shutdown(2)
            case 1:
                connection.send(b"a breach")
            case _:
                connection.close()
        try:
            self._go_on_for_a_while()
        except Fenced:
            self._note_fence()
        self._late_requests()
        self.ledger.lost()
        self.history.flush()
        os._exit(0)

    def _go_on_for_a_while(self) -> None:
        until = time.monotonic() + SETTLED_S + self.rng.random() * 0.3
        while time.monotonic() < until:
            for sequence in self.sequences:
                self.pages.verify(sequence, "pages of a cut session")
                start = sequence.published * PAGE_SIZE
                if start < sequence.written and not sequence.tail_to_copy:
                    self.pages.write(sequence, start, sequence.written)
            time.sleep(0.01)

    def _late_requests(self) -> None:
        late: list[verbs.Call[Any]] = [verbs.allocate(1), verbs.probe(self.universe.namespace(
            Path(0, 0)), [1, 2])]  # fmt: skip
        for sequence in self.sequences:
            if sequence.full_pages > sequence.published and not sequence.published:
                start, stop = sequence.published, sequence.full_pages
                tokens = self.pages.tokens(sequence)[start * PAGE_SIZE : stop * PAGE_SIZE]
                namespace = self.universe.namespace(sequence.path)
                late.append(verbs.publish(namespace, tokens, sequence.refs[start:stop]))
        for call in late:
            try:
                self.client.call(call, timeout_s=5.0)
            except (SessionEnded, DaemonUnreachable):
                self.history.count(Counter.LATE_REFUSED)
            except KvdError as e:
                self.history.violation("a late request got another error", op=call.op, code=e.code)
            else:
                self.history.violation("a late request was done", op=call.op)
