"""An admin's eyes on a daemon under attack: what must hold after each blow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from kvd_shared import verbs
from kvd_shared.client import KvdClient

WAIT_S = 20.0
POLL_S = 0.002
SETTLES_S = 5.0


class Broken(AssertionError):
    """Something that must hold does not; the run ends with it."""


class Watch:
    """One admin session that stays. Every method raises Broken where its promise does not hold."""

    def __init__(self, admin: KvdClient) -> None:
        self._admin = admin
        self.audits = 0

    def status(self) -> dict[str, Any]:
        return self._admin.call(verbs.status(), timeout_s=WAIT_S)

    def pool(self) -> dict[str, Any]:
        pool: dict[str, Any] = self.status()["pools"][0]
        return pool

    def sessions(self) -> dict[str, dict[str, Any]]:
        listed = self._admin.call(verbs.sessions(), timeout_s=WAIT_S)["sessions"]
        return {s["name"]: s for s in listed}

    def until_gone(self, name: str) -> float:
        """Wait until a session is gone and nothing is quarantined; CLOCK_MONOTONIC then."""
        deadline = time.monotonic() + WAIT_S
        while True:
            if name not in self.sessions() and not self.pool()["counts"]["quarantined"]:
                return time.monotonic()
            if time.monotonic() > deadline:
                raise Broken(f"what {name} held has not come back within {WAIT_S} s: "
                             f"{self.pool()['counts']}, {self.sessions().get(name)}")  # fmt: skip
            time.sleep(POLL_S)

    def sums(self) -> dict[str, int]:
        """Each page is in exactly one state."""
        pool = self.pool()
        counts: dict[str, int] = pool["counts"]
        if sum(counts.values()) != pool["num_pages"]:
            raise Broken(f"{counts} sum to {sum(counts.values())}, not to {pool['num_pages']}")
        return counts

    def audit(self) -> None:
        """The daemon's own check of all its invariants."""
        found = self._admin.call(verbs.audit(), timeout_s=WAIT_S)
        self.audits += 1
        if not found["ok"]:
            raise Broken(f"audit: {found['finding']}")

    def holds_of(self, session: int, holds: dict[int, int]) -> None:
        """A session that stands still holds exactly these pages, each so often."""
        name = f"session {session}"
        for ref, count in holds.items():
            found = self._admin.call(verbs.who_holds(ref & 0xFFFF_FFFF))
            theirs = {h["session"]: h["holds"] for h in found["holders"]}
            if found["generation"] != ref >> 32 or theirs.get(session) != count:
                raise Broken(f"{name} holds page {ref & 0xFFFF_FFFF}, generation {ref >> 32}, "
                             f"{count} times; kvd says: {found}")  # fmt: skip
        held = {s["id"]: s["held_pages"] for s in self.sessions().values()}[session]
        if held != len(holds):
            raise Broken(f"{name} holds {len(holds)} pages by its own account, {held} by kvd's")

    def all_given_back(self) -> None:
        """Nobody is attached: every page is free or cached, and what is cached can be evicted."""
        deadline = time.monotonic() + WAIT_S
        while True:
            counts = self.sums()
            total = sum(counts.values())
            if counts["free"] + counts["cached"] == total:
                break
            if time.monotonic() > deadline:
                raise Broken(f"nobody is attached, and yet: {counts}, {self.sessions()}")
            time.sleep(0.05)
        self.audit()
        self._admin.call(verbs.evict(total), timeout_s=WAIT_S)
        if (counts := self.sums())["free"] != total:
            raise Broken(f"everything was evicted, and yet: {counts}")
        self.audit()


def process_use(pid: int) -> dict[str, int]:
    """Open files, resident bytes and threads of a process."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "rss_bytes": int(fields["VmRSS"].split()[0]) * 1024,
        "threads": int(fields["Threads"]),
    }


def cpu_s(pid: int) -> float:
    """CPU time that a process has used, all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def until_fds(pid: int, most: int) -> dict[str, int]:
    """The same, once it has no more open files than that, or after some seconds: what is closing
    just now is no leak."""
    deadline = time.monotonic() + SETTLES_S
    while (use := process_use(pid))["fds"] > most and time.monotonic() < deadline:
        time.sleep(0.05)
    return use
