"""Named places before and after every store of the metadata, at which a test can end the process.

Nothing here costs more than reading one attribute while no failpoint is armed:

    if FAILPOINTS.armed:
        FAILPOINTS.hit("publish.before_owner")
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

VARIABLE = "KVD_FAILPOINT"

# In the order in which each operation passes them. "x.before_y" is passed before y is stored, so it
# is at once the place after the store that comes before it; "x.done" comes after the last one.
NAMES = (
    "start.before_failed",
    "start.before_epoch",
    "start.done",
    "ready.before_failed",
    "ready.done",
    "taken.before_owner",
    "taken.done",
    "freed.before_generation",
    "freed.before_owner",
    "freed.done",
    "publish.before_row",
    "publish.before_owner",
    "publish.done",
    "publish_unrecorded.before_owner",
    "publish_unrecorded.done",
    "outside.before_row",
    "outside.before_owner",
    "outside.done",
    "retained.before_row",
    "retained.done",
    "doomed.before_owner",
    "doomed.done",
    "root_added.before_body",
    "root_added.before_seal",
    "root_added.done",
    "root_dead.before_seal",
    "root_dead.done",
    "version.before_body",
    "version.before_seal",
    "version.before_old_seal",
    "version.done",
    "session_opened.before_next_id",
    "session_opened.before_body",
    "session_opened.before_seal",
    "session_opened.done",
    "session_state.before_word",
    "session_state.done",
    "session_gone.before_seal",
    "session_gone.before_word",
    "session_gone.done",
    "recovered.before_owners",
    "recovered.before_roots",
    "recovered.done",
)


class UnknownFailpoint(ValueError):
    """No failpoint has this name, or its number of passes is not one."""


class Failpoints:
    """Invariant: while `armed`, `action` is called at the `passes`-th pass of the named place."""

    __slots__ = ("_action", "_name", "_passes", "armed")

    def __init__(self) -> None:
        self.armed = False
        self._name = ""
        self._passes = 0
        self._action: Callable[[str], None] = _die

    def arm(self, name: str, passes: int = 1, action: Callable[[str], None] | None = None) -> None:
        """Call `action` (default: SIGKILL to this process) at the so-many-th pass of the place
        (name "*": of any). Raises UnknownFailpoint."""
        if name != "*" and name not in NAMES:
            raise UnknownFailpoint(
                f"failpoint {name!r}: must be one of kvd.metadata.failpoints.NAMES"
            )
        if passes < 1:
            raise UnknownFailpoint(f"failpoint {name}: pass {passes}: must be at least 1")
        self._name, self._passes = name, passes
        self._action = _die if action is None else action
        self.armed = True

    def disarm(self) -> None:
        self.armed = False

    def arm_from(self, environment: Mapping[str, str]) -> None:
        """KVD_FAILPOINT=name or name:passes. Raises UnknownFailpoint."""
        wanted = environment.get(VARIABLE)
        if not wanted:
            return
        name, _, passes = wanted.partition(":")
        if passes and not passes.isdigit():
            raise UnknownFailpoint(f"{VARIABLE}={wanted}: what follows the colon must be a number")
        self.arm(name, int(passes or 1))

    def hit(self, name: str) -> None:
        if self._name not in (name, "*"):
            return
        self._passes -= 1
        if self._passes <= 0:
            self._action(name)


def _die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAILPOINTS = Failpoints()
FAILPOINTS.arm_from(os.environ)
