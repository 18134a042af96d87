"""Some light workers that are always so many: whoever ends is replaced."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.chaos import history
from tests.chaos.checker import Findings, check
from tests.chaos.history import Records
from tests.chaos.nursery import Child, Nursery
from tests.chaos.watch import Broken, Watch
from tests.chaos.work import Options

STANDS_STILL_S = 20.0


class Crowd:
    """Invariant: `alive` are the workers that have been told nothing that ends them."""

    def __init__(self, nursery: Nursery, template: Options, count: int) -> None:
        self._nursery, self._template, self._count = nursery, template, count
        self._folder = Path(template.folder)
        self._started = 0
        self.alive: list[Child] = []
        self.names: list[str] = []  # of all that ever were
        self.ended_s: dict[str, float] = {}  # those that were killed
        self._leaving: list[Child] = []  # told to end by themselves

    def fill(self) -> None:
        """Start as many as are missing. Raises Broken where one has ended that nobody told to."""
        for child in list(self.alive):
            if child.ended():
                raise Broken(f"{child.name} has ended by itself: {self.violations()}")
        for child in list(self._leaving):
            if child.ended():
                self._leaving.remove(child)
                self._nursery.forget(child)
        while len(self.alive) < self._count:
            self._started += 1
            name = f"w{self._started}"
            seed = self._template.seed * 100_003 + self._started
            self.alive.append(self._nursery.start(replace(self._template, name=name, seed=seed)))
            self.names.append(name)

    def kill(self, child: Child) -> float:
        """SIGKILL; CLOCK_MONOTONIC just before it."""
        self.alive.remove(child)
        child.kill()
        assert child.killed_s is not None
        self.ended_s[child.name] = child.killed_s
        child.ended(STANDS_STILL_S)
        self._nursery.forget(child)
        return child.killed_s

    def cut(self, child: Child) -> None:
        """It closes its lease connection, lives on for a while, and ends by itself."""
        self.alive.remove(child)
        self._leaving.append(child)
        child.expected_to_end = True
        child.signal(signal.SIGUSR2)

    def pick(self, rng: random.Random) -> Child:
        return rng.choice(self.alive)

    def check_holds(self, watch: Watch) -> int:
        """All stand still, and kvd's account of what each holds is its own. How many pages."""
        files = {c.name: self._folder / f"{c.name}.holds" for c in self.alive}
        for child in self.alive:
            files[child.name].unlink(missing_ok=True)
            child.signal(signal.SIGUSR1)
        deadline = time.monotonic() + STANDS_STILL_S
        while not all(file.exists() for file in files.values()):
            if time.monotonic() > deadline:
                raise Broken(f"workers do not stand still: {sorted(files)}")
            time.sleep(0.005)
        held = 0
        for file in files.values():
            found = history.read_holds(file)
            watch.holds_of(*found)
            held += len(found[1])
        watch.sums()
        for child in self.alive:
            child.signal(signal.SIGUSR1)
        return held

    def end(self) -> None:
        """All give back what they have and end. Raises Broken where one does not."""
        for child in self.alive:
            child.expected_to_end = True
            child.signal(signal.SIGTERM)
        for child in self.alive + self._leaving:
            if not child.ended(STANDS_STILL_S):
                raise Broken(f"{child.name} does not end")
            self._nursery.forget(child)
        self.alive.clear()
        self._leaving.clear()

    # --- what they noted

    def records(self) -> dict[str, Records]:
        return {name: history.read_records(self._folder, name) for name in self.names}

    def check_histories(self) -> Findings:
        return check(self.records(), self.ended_s)

    def counters(self) -> dict[str, int]:
        """Of all, in all."""
        each = [history.read_counters(self._folder, name) for name in self.names]
        return {key: sum(one[key] for one in each) for key in each[0]} if each else {}

    def violations(self) -> list[dict[str, Any]]:
        return [v for name in self.names for v in history.read_violations(self._folder, name)]
