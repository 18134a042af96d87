"""What the daemon knows, without sockets: pools, who is attached to which, who may ask what."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvd.cache import CacheManager
from kvd.events.publisher import Publisher
from kvd.page_pool import MemfdPool
from kvd.session import Session
from kvd_shared.errors import (
    Draining,
    LayoutMismatch,
    NotAllowed,
    OverLimit,
    SessionEnded,
    UnknownPool,
    brief,
)
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import GEOMETRY, AttachRequest, PoolOffer
from kvd_shared.wire import TOKEN_LENGTH

MAX_SESSIONS = 1024  # unless configured


@dataclass(frozen=True, slots=True)
class Pool:
    """One configured pool: its memory and its cache."""

    name: str
    device: str
    memory: MemfdPool
    model: str | None  # fingerprint; None: any model of this layout
    cache: CacheManager
    pool_id: str = field(default_factory=lambda: secrets.token_hex(8))

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
    token: bytes
    role: str
    name: str
    pid: int
    uid: int
    attached_s: float
    pool: Pool | None
    session: Session | None
    route: bytes | None = None  # where its last request came from, for notices
    ended: bool = False  # its connection is closed; what it holds waits for the proof of its death


class Daemon:
    """Invariants: tokens name listed attachments; an attachment is listed until its process is
    proven dead, or has detached."""

    def __init__(
        self, pools: list[Pool], socket_dir: Path, now: float, max_sessions: int = MAX_SESSIONS
    ) -> None:
        self.socket_dir = socket_dir
        self.max_sessions = max_sessions
        self.pools = {pool.name: pool for pool in pools}
        self.started_s = now
        self.draining = False
        self.attachments: dict[int, Attachment] = {}
        self.wake: Callable[[], None] = lambda: (
            None
        )  # told when others may wait for news, or there are chores
        self.gone: Callable[[Attachment], None] = lambda attachment: None  # told once for each
        self.publishers: dict[str, Publisher] = {}  # of KV events, by pool
        self.refused: Counter[str] = Counter()  # requests, by the error's code
        self._by_token: dict[bytes, Attachment] = {}
        self._next_id = 1

    # --- attaching

    def attach(self, request: AttachRequest, pid: int, uid: int, now: float) -> Attachment:
        """Admit a process whose kernel credentials are (pid, uid)."""
        if pid != request.pid:
            seen = f"pid {pid}" if pid else "no pid at all"
            raise NotAllowed(
                f"the peer calls itself pid {request.pid}, the kernel shows {seen}: it runs in "
                "another PID namespace, where its death could not be seen; run it in kvd's "
                "(for containers: share the host's PID namespace)",
                claimed=request.pid,
                seen=pid,
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
        session_id, self._next_id = self._next_id, self._next_id + 1
        session = pool.cache.open_session(session_id, request.name, now) if pool else None
        attachment = Attachment(
            session_id,
            secrets.token_bytes(TOKEN_LENGTH),
            request.role,
            request.name,
            pid,
            uid,
            now,
            pool,
            session,
        )
        self.attachments[session_id] = self._by_token[attachment.token] = attachment
        return attachment

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

    def end(self, attachment: Attachment) -> None:
        """Nothing more is answered under this session. What it holds waits for `dead`."""
        if attachment.ended:
            return
        attachment.ended = True
        if attachment.pool and attachment.session:
            attachment.pool.cache.end_session(attachment.session)
            self.wake()

    def dead(self, attachment: Attachment, now: float) -> None:
        """The process is proven dead, or has detached: what it held comes back."""
        self.end(attachment)
        if self.attachments.pop(attachment.id, None) is None:
            return
        del self._by_token[attachment.token]
        if attachment.pool and attachment.session:
            attachment.pool.cache.release_session(attachment.session)
            self.wake()
        self.gone(attachment)

    def drain(self) -> None:
        """Admit nothing new; what has begun may finish."""
        self.draining = True
        for pool in self.pools.values():
            pool.cache.draining = True

    # --- asking

    def attachment(self, token: Any, pid: int, *, ended_too: bool = False) -> Attachment:
        """Whose token this is. A session is spoken for by its own process only.

        `ended_too`: for detaching, which a stalled daemon can read after the connection's end.
        """
        found = self._by_token.get(token) if isinstance(token, bytes) else None
        if found is None or (found.ended and not ended_too):
            raise SessionEnded("no live session has this token: attach again")
        if found.pid != pid:
            raise NotAllowed(
                f"session {found.id} belongs to process {found.pid}, and process {pid} asks: "
                "each process attaches by itself",
                session=found.id,
            )
        return found

    @property
    def num_requests(self) -> int:
        """Sequences that have begun and not ended, of all pools."""
        return sum(len(pool.cache.queue) for pool in self.pools.values())
