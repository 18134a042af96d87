"""What a process tells its service manager: sd_notify's datagrams, to systemd or to kvd's keeper.

A message is lines of KEY=VALUE; fds travel with it as SCM_RIGHTS. The manager never answers, but
for the barrier, whose fd it closes once it has read all that was sent before.
sd_notify(3), https://systemd.io/FILE_DESCRIPTOR_STORE
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import MutableMapping, Sequence

NOTIFY_VARIABLE = "NOTIFY_SOCKET"
WATCHDOG_VARIABLES = ("WATCHDOG_USEC", "WATCHDOG_PID")
PATIENCE_S = 5.0  # for a manager whose queue is full, while the daemon starts or stops
MAX_NAME = 255  # characters of a stored fd's name


class NotifyFailed(Exception):
    """The manager could not be told: nobody reads the socket, or it stays full."""


class NotifySocket:
    """One manager's address. Holds no connection: every message finds the socket anew, so that a
    manager that was restarted in between hears it.

    Every method raises NotifyFailed when the message did not get into the manager's queue.
    """

    def __init__(self, address: str) -> None:
        """A path, or "@name" of an abstract socket. Raises NotifyFailed for anything else."""
        if address[:1] not in ("/", "@") or len(address) < 2:
            raise NotifyFailed(
                f"{NOTIFY_VARIABLE} = {address!r}: must be an absolute path or @name; unset it to "
                "run without a service manager"
            )
        self.address = address
        self._target = "\0" + address[1:] if address[0] == "@" else address

    @classmethod
    def from_environment(cls, env: MutableMapping[str, str]) -> NotifySocket | None:
        """None: there is no manager. The variable is taken out of `env`, so that no child of this
        process speaks in its name. Raises NotifyFailed for an address that is none."""
        address = env.pop(NOTIFY_VARIABLE, "")
        return cls(address) if address else None

    def ready(self, status: str) -> None:
        """The service serves. Its start counts as done from here, and its watchdog runs."""
        self.send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`. Never waits."""
        self.send(f"STATUS={text}", wait_s=0)

    def watchdog(self) -> None:
        """The service is alive. Never waits: a full queue has another message of ours in it."""
        self.send("WATCHDOG=1", wait_s=0)

    def abort_me(self) -> None:
        """The service found itself broken: as if its watchdog had run out."""
        self.send("WATCHDOG=trigger")

    def stopping(self) -> None:
        self.send("STOPPING=1")

    def store(self, name: str, fd: int) -> None:
        """Keep a duplicate of `fd` beyond this process's death, whatever polling it says."""
        self.send("FDSTORE=1", f"FDNAME={_checked(name)}", "FDPOLL=0", fds=[fd])

    def remove(self, name: str) -> None:
        """Close every kept fd of that name."""
        self.send("FDSTOREREMOVE=1", f"FDNAME={_checked(name)}")

    def barrier(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the manager has taken up everything sent before."""
        ours, theirs = os.pipe()
        try:
            try:
                self.send("BARRIER=1", fds=[theirs])
            finally:
                os.close(theirs)
            poll = select.poll()
            poll.register(ours, 0)  # a hang-up is always told
            if not poll.poll(timeout_s * 1000):
                raise NotifyFailed(
                    f"{self.address}: not read within {timeout_s:g} s: the service manager hangs"
                )
        finally:
            os.close(ours)

    def send(self, *lines: str, fds: Sequence[int] = (), wait_s: float = PATIENCE_S) -> None:
        """`wait_s`: how long to wait for room in the queue; 0 drops the message when it is full,
        without an error."""
        message = "\n".join(lines).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(wait_s)
            try:
                channel.connect(self._target)
                socket.send_fds(channel, [message], fds)
            except BlockingIOError:
                return
            except TimeoutError:
                reason = f"its queue was full for {wait_s:g} s"
                raise NotifyFailed(f"{self.address}: {lines[0]}: {reason}") from None
            except OSError as e:
                raise NotifyFailed(f"{self.address}: {lines[0]}: {e.strerror or e}") from e


def watchdog_s(env: MutableMapping[str, str]) -> float | None:
    """Silence of this process that its manager takes for a hang; None: it does not look. Takes the
    variables out of `env`. sd_watchdog_enabled(3): it is for this process if it names none."""
    usec, pid = (env.pop(variable, "") for variable in WATCHDOG_VARIABLES)
    if pid not in ("", str(os.getpid())) or not usec.isdecimal():
        return None
    return int(usec) / 1e6 or None


def _checked(name: str) -> str:
    """A manager ignores a name that is not ASCII, or has ':' or control characters: the fd would
    be kept under another one."""
    good = name.isascii() and name.isprintable() and ":" not in name
    if not good or not 0 < len(name) <= MAX_NAME:
        raise ValueError(
            f"fd name {name!r}: must be 1 to {MAX_NAME} printable ASCII characters without ':'"
        )
    return name
