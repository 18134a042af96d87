"""What a worker tells the service manager that started it, if one did."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping

import structlog

from kvd_shared.notify import NotifyFailed, NotifySocket, watchdog_s

FEEDS_A_LIMIT = 4  # messages within the silence that is taken for a hang

log = structlog.get_logger()


class Manager:
    """Nothing here raises: a worker does not end because its manager did.

    Invariant: without a manager nothing is sent.
    """

    def __init__(self, address: NotifySocket | None, silence_s: float | None) -> None:
        """Use `from_environment`."""
        self._address = address
        self._feed_every_s = silence_s / FEEDS_A_LIMIT if silence_s else None
        self._feed_at_s = float("-inf")

    @classmethod
    def from_environment(cls, env: MutableMapping[str, str]) -> Manager:
        """Takes the variables out of `env`, so that no child speaks in this process's name."""
        silence_s = watchdog_s(env)
        try:
            return cls(NotifySocket.from_environment(env), silence_s)
        except NotifyFailed as e:
            log.warning("manager.none", error=str(e))
            return cls(None, None)

    def ready(self, status: str) -> None:
        self._tell(lambda address: address.ready(status))

    def stopping(self) -> None:
        self._tell(lambda address: address.stopping())

    def alive(self) -> None:
        """The step loop turns. To be called at every turn: it is told as often as needed."""
        if self._feed_every_s is None or time.monotonic() < self._feed_at_s:
            return
        self._feed_at_s = time.monotonic() + self._feed_every_s
        self._tell(lambda address: address.watchdog())

    def _tell(self, message: Callable[[NotifySocket], None]) -> None:
        if self._address is None:
            return
        try:
            message(self._address)
        except NotifyFailed as e:
            self._address = self._feed_every_s = None
            log.warning("manager.lost", error=str(e))
