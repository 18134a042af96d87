"""Who keeps the daemon's memory when the daemon dies, and what that one is told.

systemd   a service manager that set NOTIFY_SOCKET
keeper    `kvd serve`'s own parent process (keeper.py)
none      nobody: the memory ends with the daemon
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping

import structlog

from kvd.fd_store import FdStore, received_fds
from kvd.keeper import KEEPER_VARIABLE
from kvd_shared.notify import NotifyFailed, NotifySocket, watchdog_s

SYSTEMD, KEEPER, NONE = "systemd", "keeper", "none"
STORE_VARIABLE = "FDSTORE"  # how many fds the manager keeps; systemd says so since version 254

log = structlog.get_logger()


class Survival:
    """What is said here never raises: a daemon does not end because its manager did.

    Invariant: `kind` is NONE for good once something was not kept, and `on_lost` was called then;
    without a manager nothing is sent.
    """

    def __init__(
        self,
        manager: NotifySocket | None,
        received: Mapping[str, list[int]],
        *,
        kind: str,
        max_fds: int | None = None,  # None: the manager does not say
        watchdog_s: float | None = None,  # silence that it takes for a hang; None: never
    ) -> None:
        """Use `from_environment`."""
        self.kind = NONE if manager is None else kind
        self.watchdog_s = None if manager is None else watchdog_s
        self.on_lost: Callable[[], None] = lambda: None
        self.store = FdStore(manager, received)
        self._manager, self._max_fds = manager, max_fds

    @classmethod
    def from_environment(cls, env: MutableMapping[str, str]) -> Survival:
        """Of this process, whose files must not be open yet. Takes the variables that are for this
        process alone out of `env`."""
        received = received_fds(env)
        keeper, max_fds = env.pop(KEEPER_VARIABLE, ""), env.pop(STORE_VARIABLE, "")
        silence_s = watchdog_s(env)
        try:
            manager = NotifySocket.from_environment(env)
        except NotifyFailed as e:
            log.warning("survival.no_manager", error=str(e))
            manager = None
        return cls(
            manager,
            received,
            kind=KEEPER if keeper == str(os.getppid()) else SYSTEMD,
            max_fds=int(max_fds) if max_fds.isdecimal() else None,
            watchdog_s=silence_s,
        )

    def watch_keeper(self) -> int | None:
        """A pidfd, the caller's, that becomes readable when the keeper is gone: call `gone` then.
        None without a keeper."""
        if self.kind != KEEPER:
            return None
        keeper = os.getppid()
        pidfd = os.pidfd_open(keeper)
        if os.getppid() != keeper:  # it died in between; its number may be another's by now
            os.close(pidfd)
            self.gone("the keeper has ended")
            return None
        return pidfd

    # --- the memory

    def keep(self, fds: Mapping[str, int], total: int) -> None:
        """From now on these fds are kept, by name; if not all of them can be, `kind` is NONE.
        `total`: how many there are with those that were kept before."""
        if self._max_fds is not None and total > self._max_fds:
            self._not_kept(
                f"the service manager keeps at most {self._max_fds} fds, the pools have {total}",
                "raise FileDescriptorStoreMax= of the unit",
            )
        elif self.kind != NONE:
            self._tell(lambda _: self.store.store(fds))

    def forget(self, names: Iterable[str]) -> None:
        """Of what is kept under these names nothing is left: but for what was taken, which is to
        be closed before."""
        gone = list(names)
        self.store.discard(gone)
        self._tell(lambda _: self.store.remove(gone))

    def gone(self, why: str) -> None:
        """The manager is no more. Idempotent."""
        if self._manager is not None:
            self._manager = self.watchdog_s = None
            self._not_kept(why, "restart kvd when a cold start suits")

    def _not_kept(self, why: str, remedy: str) -> None:
        if self.kind != NONE:
            log.warning("survival.lost", kept_by=self.kind, why=why, remedy=remedy,
                        effect="when the daemon ends, its memory does")  # fmt: skip
            self.kind = NONE
            self.on_lost()

    # --- the state

    def ready(self, status: str) -> None:
        self._tell(lambda manager: manager.ready(status))

    def status(self, text: str) -> None:
        self._tell(lambda manager: manager.status(text))

    def alive(self) -> None:
        self._tell(lambda manager: manager.watchdog())

    def broken(self) -> None:
        """Asks for an end of this process, at once, and for a new one."""
        self._tell(lambda manager: manager.abort_me())

    def stopping(self) -> None:
        self._tell(lambda manager: manager.stopping())

    def _tell(self, message: Callable[[NotifySocket], None]) -> None:
        if self._manager is None:
            return
        try:
            message(self._manager)
        except NotifyFailed as e:
            self.gone(str(e))
