"""What the daemon knows, without sockets: pools, who is attached to which, who may ask what."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvd.access import Access
from kvd.breaches import Breaches
from kvd.cache import CacheManager
from kvd.events.publisher import Publisher
from kvd.metadata import ProcessEntry
from kvd.page_pool import MemfdPool
from kvd.process import Process
from kvd.recovery import Recovery
from kvd.refusals import Refusals
from kvd.reply_window import ReplyWindow
from kvd.session import Session
from kvd_shared.errors import (
    Draining,
    LayoutMismatch,
    NotAllowed,
    OverLimit,
    SessionEnded,
    StaleEpoch,
    UnknownHandle,
    UnknownPool,
    brief,
)
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import GEOMETRY, AttachRequest, PoolOffer
from kvd_shared.wire import TOKEN_LENGTH

MAX_SESSIONS = 1024  # unless configured


@dataclass(frozen=True, slots=True)
class Pool:
    """One configured pool: its memory and its cache. `recovery`: what is to be settled with the
    sessions of the daemon before, behind a warm start."""

    name: str
    device: str
    memory: MemfdPool
    model: str | None  # fingerprint; None: any model of this layout
    cache: CacheManager
    pool_id: str = field(default_factory=lambda: secrets.token_hex(8))
    recovery: Recovery | None = None

    @property
    def layout(self) -> PoolLayout:
        return self.memory.layout

    def offer(self) -> PoolOffer:
        return PoolOffer(
            name=self.name,
            pool_id=self.pool_id,
            layout=self.layout,
            num_pages=self.memory.num_pages,
            model=self.model,
            chunk_bytes=list(self.memory.chunk_bytes),
        )


@dataclass(slots=True)
class Attachment:
    """One attached process. `session` is its part in the pool's cache (None for role admin)."""

    id: int
    token: bytes  # b"": the digest alone is known, for the session has not resumed
    epoch: int  # requests of another one are refused
    role: str
    name: str
    process: Process
    attached_s: float
    pool: Pool | None
    session: Session | None
    route: bytes | None = None  # where its last request came from, for notices
    window: ReplyWindow = field(default_factory=ReplyWindow)
    declaring: bool = False  # it has resumed, and says what it holds before anything else
    ended_s: float | None = None  # since then nothing is answered, and what it holds waits
    dead_s: float | None = None  # since then its death is proven, and only the grace is awaited

    @property
    def ended(self) -> bool:
        return self.ended_s is not None

    @property
    def num_held_pages(self) -> int:
        return self.session.num_held_pages if self.session else 0


class Daemon:
    """Invariants: tokens name listed attachments; an attachment is listed until its process is
    proven dead, or has detached. No session ever has the number of another one of the same pool,
    whichever daemon gave it."""

    def __init__(
        self,
        pools: list[Pool],
        socket_dir: Path,
        now: float,
        max_sessions: int = MAX_SESSIONS,
        access: Access | None = None,
    ) -> None:
        self.socket_dir = socket_dir
        self.max_sessions = max_sessions
        self.access = access or Access.standard(os.geteuid(), os.getegid())
        self.refusals = Refusals(time.monotonic)
        self.breaches = Breaches(time.monotonic)
        self.quarantine_alarms = 0  # sessions that ended and whose process went on living too long
        self.pools = {pool.name: pool for pool in pools}
        self.started_s = now
        self.draining = False
        self.attachments: dict[int, Attachment] = {}
        self.wake: Callable[[], None] = lambda: (
            None
        )  # told when others may wait for news, or there are chores
        # told once for each: that it has ended and why; that its process is gone
        self.ended: Callable[[Attachment, str], None] = lambda attachment, why: None
        self.gone: Callable[[Attachment], None] = lambda attachment: None
        self.publishers: dict[str, Publisher] = {}  # of KV events, by pool
        self.refused: Counter[str] = Counter()  # requests, by the error's code
        self._by_token: dict[bytes, Attachment] = {}
        self._by_digest: dict[bytes, Attachment] = {}  # of sessions that have not resumed
        headers = [pool.cache.meta.header for pool in pools]
        self.epoch = max((header.epoch for header in headers), default=1)
        self._next_id = max((header.next_session_id for header in headers), default=1)

    # --- attaching

    def attach(self, request: AttachRequest, process: Process, now: float) -> Attachment:
        """Admit a process that the kernel vouches for. Once it is listed, its end closes it."""
        self.access.check(request.role, process)
        if process.pid != request.pid:
            seen = f"pid {process.pid}" if process.pid else "no pid at all"
            raise NotAllowed(
                f"the peer calls itself pid {request.pid}, the kernel shows {seen}: it runs in "
                "another PID namespace, where its death could not be seen; run it in kvd's "
                "(for containers: share the host's PID namespace)",
                reason="pid_namespace",
                claimed=request.pid,
                seen=process.pid,
            )
        if self.draining:
            raise Draining("the daemon is shutting down: attach again when it is back")
        if len(self.attachments) >= self.max_sessions:
            raise OverLimit(
                f"{self.max_sessions} processes are attached, as many as may be "
                "(daemon.max_sessions): end one first, or raise the limit",
                limit="max_sessions",
                value=len(self.attachments) + 1,
                most=self.max_sessions,
            )
        pool = self._pool_for(request) if request.role == "worker" else None
        session_id, token, session = self._next_id, secrets.token_bytes(TOKEN_LENGTH), None
        if pool is not None:
            entry = ProcessEntry(
                token_digest=sha256(token).digest(),
                pid=process.pid,
                start_time=process.start_ticks,
                uid=process.uid,
                gid=process.gid,
                name=request.name,
                role=request.role,
            )
            session = pool.cache.open_session(session_id, request.name, now, entry)
        self._next_id += 1
        for each in self.pools.values():  # an admin's number, too, is never given again
            each.cache.meta.header.next_session_id = self._next_id
        epoch = pool.cache.meta.header.epoch if pool else self.epoch
        attachment = Attachment(
            session_id, token, epoch, request.role, request.name, process, now, pool, session
        )
        self.attachments[session_id] = self._by_token[token] = attachment
        return attachment

    def reopened(self, attachment: Attachment, token_digest: bytes) -> None:
        """List a session of the daemon before, which has ended until it resumes."""
        assert attachment.ended
        self.attachments[attachment.id] = self._by_digest[token_digest] = attachment

    def resumed(self, attachment: Attachment, token: bytes, now: float) -> None:
        """It goes on, and first declares what it holds."""
        del self._by_digest[sha256(token).digest()]
        attachment.token, attachment.attached_s = token, now
        attachment.ended_s, attachment.declaring = None, True
        self._by_token[token] = attachment

    def awaited(self, token: bytes) -> Attachment | None:
        """Whose token this is, of the sessions that have not resumed."""
        return self._by_digest.get(sha256(token).digest()) if self._by_digest else None

    def _pool_for(self, request: AttachRequest) -> Pool:
        pool = self._named(request)
        if None not in (request.model, pool.model) and request.model != pool.model:
            raise LayoutMismatch(
                f"the worker's model {request.model} is not that of pool {pool.name!r}, "
                f"{pool.model} (config and weights content): point both at the same folder",
                worker=request.model,
                pool=pool.model,
            )
        ours = {name: getattr(pool.layout, name) for name in GEOMETRY}
        if request.geometry is not None and request.geometry != ours:
            raise LayoutMismatch(
                f"the worker's KV geometry {request.geometry} is not that of pool "
                f"{pool.name!r}, {ours}",
                worker=request.geometry,
                pool=ours,
            )
        return pool

    def _named(self, request: AttachRequest) -> Pool:
        known = ", ".join(sorted(self.pools))
        if request.pool is not None:
            if request.pool not in self.pools:
                raise UnknownPool(f"no pool {brief(request.pool)}; there are: {known}")
            return self.pools[request.pool]
        fitting = list(self.pools.values())
        if len(fitting) > 1:
            fitting = [p for p in fitting if p.model is not None and p.model == request.model]
        if len(fitting) != 1:
            raise UnknownPool(f"{len(self.pools)} pools are served; name one of: {known}")
        return fitting[0]

    # --- ending: one way, whoever calls it, as often as they like

    def end_session(self, attachment: Attachment, why: str, now: float) -> None:
        """Nothing more is answered under this session. What it holds waits for `dead`."""
        if attachment.ended:
            return
        attachment.ended_s = now
        if attachment.pool and attachment.session:
            attachment.pool.cache.end_session(attachment.session)
            self.wake()
        self.ended(attachment, why)

    def dead(self, attachment: Attachment, now: float, why: str = "died") -> None:
        """The process is proven dead, or has detached: what it held comes back."""
        self.end_session(attachment, why, now)
        if self.attachments.pop(attachment.id, None) is None:
            return
        self._by_token.pop(attachment.token, None)
        if not attachment.token:
            self._by_digest = {k: v for k, v in self._by_digest.items() if v is not attachment}
        if attachment.pool and attachment.session:
            if attachment.pool.recovery:
                attachment.pool.recovery.dead(attachment.session, now)
            else:
                attachment.pool.cache.release_session(attachment.session)
            self.wake()
        self.gone(attachment)

    def kill(self, session: int, now: float) -> Attachment:
        """End a session and its process; what it holds comes back once its death is proven.

        Raises UnknownHandle, NotAllowed. Nobody else is ever hit: the signal goes to the process
        that attached, whoever has its id now.
        """
        attachment = self.attachments.get(session)
        if attachment is None:
            raise UnknownHandle(f"no session {session}: `kvdctl sessions` lists those that are")
        attachment.process.kill()
        self.end_session(attachment, "killed", now)
        return attachment

    def drain(self) -> None:
        """Admit nothing new; what has begun may finish."""
        self.draining = True
        for pool in self.pools.values():
            pool.cache.draining = True

    # --- asking

    def attachment(self, token: Any, pid: int, uid: int, *, ended_too: bool = False) -> Attachment:
        """Whose token this is. A session is spoken for by its own process only.

        `ended_too`: for detaching, which a stalled daemon can read after the connection's end.
        """
        found = self._by_token.get(token) if isinstance(token, bytes) else None
        if found is None and isinstance(token, bytes):
            found = self.awaited(token)
        if found is None:
            raise SessionEnded("no live session has this token: attach again")
        if found.process.uid != uid:
            raise NotAllowed(
                f"this session's token is not one of user {uid}: each process attaches by itself",
                reason="other_user",
            )
        if found.process.pid != pid:
            raise NotAllowed(
                f"session {found.id} belongs to process {found.process.pid}, and process {pid} "
                "asks: each process attaches by itself",
                reason="other_process",
                session=found.id,
            )
        if found.ended and not ended_too:
            if found.pool and found.pool.recovery and found.id in found.pool.recovery.waiting:
                raise StaleEpoch(
                    f"session {found.id} is of the daemon before this one: resume it",
                    current=found.epoch,
                )
            raise SessionEnded(f"session {found.id} is over: attach again")
        return found

    def vouch(self, attachment: Attachment) -> None:
        """Raises SessionEnded when the session's process is dead: its id can be another's by now,
        and a message can be read before the news of the death. For each new connection."""
        if attachment.process.is_dead:
            raise SessionEnded(
                "this session's process is dead: attach again", reason="dead_process"
            )

    @property
    def num_requests(self) -> int:
        """Sequences that have begun and not ended, of all pools."""
        return sum(len(pool.cache.queue) for pool in self.pools.values())
