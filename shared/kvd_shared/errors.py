"""Every way in which kvd says no. One class per misuse; the code is what travels on the wire."""

from __future__ import annotations

from reprlib import Repr
from typing import Any, ClassVar

MIN_INT, MAX_INT = -(1 << 63), (1 << 64) - 1  # that msgpack has
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 80


class KvdError(Exception):
    """A request was refused and changed nothing.

    `code` is stable and travels on the wire; `retryable` says whether the same request can succeed
    later without being changed; `details` holds the numbers of the message for programs.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class BadRequest(KvdError):
    """The frame or one of its fields cannot be understood."""

    code = "BAD_REQUEST"


class TooLarge(KvdError):
    """A message is over the size limit; refused before it is sent."""

    code = "TOO_LARGE"


class ProtocolMismatch(KvdError):
    """The peer speaks a protocol version that this side does not."""

    code = "PROTOCOL_MISMATCH"


class LayoutMismatch(KvdError):
    """The worker's model or KV layout is not the pool's."""

    code = "LAYOUT_MISMATCH"


class NotAllowed(KvdError):
    """The peer's credentials or role do not permit this."""

    code = "NOT_ALLOWED"


class UnknownPool(KvdError):
    """No pool of that name is configured."""

    code = "UNKNOWN_POOL"


class SessionEnded(KvdError):
    """The session token is unknown or its session is over; attach again."""

    code = "SESSION_ENDED"
    retryable = True


class PoolLost(KvdError):
    """The memory that the session mapped is not the daemon's any more: it started with an empty
    pool. Unmap, and attach again."""

    code = "POOL_LOST"
    retryable = True


class Undeclared(KvdError):
    """The session has resumed, and has not yet said what it holds: that comes first."""

    code = "UNDECLARED"


class DeadlineExceeded(KvdError):
    """The request was taken up when its sender no longer waited. Nothing was done."""

    code = "DEADLINE_EXCEEDED"
    retryable = True


class ReplyGone(KvdError):
    """A request number that was used before, and whose answer is not kept any more. Nothing was
    done now; it may have been done then."""

    code = "REPLY_GONE"


class NotHeld(KvdError):
    """A page reference that the session does not hold: a double free or a stale generation."""

    code = "NOT_HELD"


class UnknownRequest(KvdError):
    """A request number that this session did not begin or has ended."""

    code = "UNKNOWN_REQUEST"


class NoPages(KvdError):
    """Not enough pages are free or evictable for this request now. Details: `missing`, pages."""

    code = "NO_PAGES"
    retryable = True


class OverLimit(KvdError):
    """More than a configured limit allows. Details: `limit` (its name), `value`, `most`."""

    code = "OVER_LIMIT"


class OverQuota(KvdError):
    """More pages retained by operators than their share of the pool. Details: `wanted`, `most`."""

    code = "OVER_QUOTA"


class StaleVersion(KvdError):
    """KV of an older weights version than the model's: compute on, but publish it no more.
    Details: `version`, `minimum`."""

    code = "STALE_VERSION"


class Detached(KvdError):
    """The pages before these were flushed, so nothing can be matched behind them: compute on, but
    publish this sequence no more."""

    code = "DETACHED"


class UnknownHandle(KvdError):
    """A sequence or ticket that this session does not have, or that is over."""

    code = "UNKNOWN_HANDLE"


class Draining(KvdError):
    """The daemon is shutting down and admits nothing new."""

    code = "DRAINING"
    retryable = True


class Busy(KvdError):
    """The daemon lacks something for this just now."""

    code = "BUSY"
    retryable = True


class DaemonUnreachable(KvdError):
    """No daemon answers on the sockets: not started, gone, or not permitted."""

    code = "DAEMON_UNREACHABLE"
    retryable = True


class DaemonTimeout(DaemonUnreachable):
    """A daemon is there and did not answer in time. What was asked may have been done."""

    code = "DAEMON_TIMEOUT"


class StaleEpoch(DaemonUnreachable):
    """The daemon has restarted since this session was with it; nothing was done. Resume. Details:
    `epoch`, of the request, and `current`."""

    code = "STALE_EPOCH"


_KINDS: list[type[KvdError]] = [
    KvdError,
    *KvdError.__subclasses__(),
    *DaemonUnreachable.__subclasses__(),
]
_BY_CODE = {kind.code: kind for kind in _KINDS}


def brief(value: Any) -> str:
    """A refused value as a message shows it: its repr, cut, since the peer chose how long it is."""
    return _REPR.repr(value)


def error_to_wire(error: KvdError) -> dict[str, Any]:
    """The `error` map of a reply."""
    details = {name: _sendable(value) for name, value in error.details.items()}
    return {"code": error.code, "message": error.message, "details": details}


def _sendable(value: Any) -> Any:
    """msgpack has whole numbers of 64 bits. A peer can ask for more than that of something, and
    must be told even so."""
    return max(MIN_INT, min(value, MAX_INT)) if type(value) is int else value


def error_from_wire(wire: dict[str, Any]) -> KvdError:
    """The typed error of a reply; an unknown code (a newer daemon's) becomes a plain KvdError."""
    code, message = str(wire.get("code")), str(wire.get("message"))
    details = {str(k): v for k, v in (wire.get("details") or {}).items() if k != "message"}
    cls = _BY_CODE.get(code)
    return cls(message, **details) if cls else KvdError(f"{code}: {message}", **details)
