"""`python -m tests.chaos.holdout SOCKET_DIR SEED CUT`: a worker to be stopped in the middle.

It reads some cached pages and writes some of its own without end, says which in a line of JSON, and
is then stopped by whoever started it. A line on its stdin lets it finish: it looks at what it read
and wrote, tries to publish, and says how that went. CUT is "cut" where it closes its lease
connection before; then its session is over while it lives.
"""

from __future__ import annotations

import ctypes
import json
import select
import signal
import sys
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import KvdError
from kvd_shared.refs import page_ids
from tests.chaos.content import LANES, PAGE_SIZE, Path, Universe, Words

OWN_PAGES = 8
DOCUMENT = 3  # of the universe: what it reads


class Holdout:
    def __init__(self, socket_dir: FilePath, seed: int) -> None:
        self.universe = Universe(seed)
        self.client = KvdClient.attach(socket_dir, name="holdout")
        assert self.client.mapping is not None
        shape = (-1, PAGE_SIZE, LANES)
        self._read = np.frombuffer(self.client.mapping.read_view(), "<u8").reshape(shape)
        self._write = np.frombuffer(self.client.mapping.write_view(), "<u8").reshape(shape)
        self.path = Path(DOCUMENT, 0)
        self.namespace = self.universe.namespace(self.path)
        self.tokens = self.universe.tokens(self.path)
        self.words = self.universe.words(self.path)
        self._pattern: Words = np.zeros((OWN_PAGES, PAGE_SIZE, LANES), dtype=np.uint64)

    def take(self) -> dict[str, Any]:
        """Publish a prompt, hold it as any other reader does, and take pages to write."""
        pages = len(self.universe.document(DOCUMENT)) // PAGE_SIZE
        tokens = self.tokens[: pages * PAGE_SIZE]
        refs = self.client.call(verbs.allocate(pages))
        self._write[page_ids(refs)] = self.words[: len(tokens)].reshape(-1, PAGE_SIZE, LANES)
        done = self.client.call(verbs.publish(self.namespace, tokens, refs))
        self.client.call(verbs.free(done.refs))
        found = self.client.call(verbs.match(self.namespace, self.tokens))
        self.reads, self.num_read = found.refs, found.num_matched_pages
        self.own = self.client.call(verbs.allocate(OWN_PAGES))
        return {"session": self.client.session, "reads": self.reads.tolist(),
                "writes": self.own.tolist()}  # fmt: skip

    def write_until_told(self) -> None:
        """Stopped anywhere in here."""
        number = 0
        poll = select.poll()
        poll.register(0, select.POLLIN)
        while not poll.poll(0):
            number += 1
            pattern = np.arange(self._pattern.size, dtype=np.uint64) * np.uint64(2 * number + 1)
            self._pattern = pattern.reshape(self._pattern.shape)
            for place, page in enumerate(page_ids(self.own).tolist()):
                self._write[page] = self._pattern[place]
        sys.stdin.readline()

    def finish(self) -> dict[str, Any]:
        """`emitted_wrong`: it read something wrong, and was not told that it is fenced."""
        wanted = self.words[: self.num_read * PAGE_SIZE].reshape(-1, PAGE_SIZE, LANES)
        read_right = bool((self._read[page_ids(self.reads[: self.num_read])] == wanted).all())
        fenced = self.client.fenced
        own_right = bool((self._read[page_ids(self.own)] == self._pattern).all())
        tokens = np.arange(OWN_PAGES * PAGE_SIZE)
        late: dict[str, str] = {}
        calls: list[verbs.Call[Any]] = [
            verbs.publish(self.namespace, tokens, self.own),
            verbs.free(self.own[:1]),
            verbs.allocate(1),
        ]
        for call in calls:
            try:
                self.client.call(call)
                late[call.op] = "OK"
            except KvdError as e:
                late[call.op] = e.code
        return {"read_right": read_right, "own_right": own_right, "late": late, "fenced": fenced,
                "emitted_wrong": not read_right and not fenced}  # fmt: skip


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    holdout = Holdout(FilePath(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps(holdout.take()), flush=True)
    if sys.argv[3] == "cut":
        holdout.client._connection.shutdown(2)
    holdout.write_until_told()
    print(json.dumps(holdout.finish()), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
