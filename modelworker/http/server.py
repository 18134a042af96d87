"""uvicorn in a thread of its own, so that the main thread keeps signals and the engine."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from kvd_shared.errors import KvdError

OnReady = Callable[[str], None]


class CannotListen(KvdError):
    """The address is taken, not this machine's, or not permitted."""

    code = "CANNOT_LISTEN"


def serve(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    on_ready: OnReady = lambda url: None,
    grace_s: float = 30.0,
) -> ServerHandle:
    """Binds, then serves from a new thread. Port 0 takes a free one.

    `on_ready` is called from that thread with the real URL once requests are answered. On `stop`,
    requests that run get `grace_s` to end. Raises CannotListen.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise CannotListen(f"cannot listen on {host} port {port}: {error}") from error
    real_port = listener.getsockname()[1]
    url = f"http://[{host}]:{real_port}" if ":" in host else f"http://{host}:{real_port}"
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,  # the program that serves decides about logs
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(grace_s),
    )
    return ServerHandle(_Server(config, lambda: on_ready(url)), listener, url)


class ServerHandle:
    """A server that runs. `url` has the real port."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket, url: str) -> None:
        self.url = url
        self._server = server
        self._listener = listener
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Takes no new connections; returns at once. May be called from a signal handler."""
        self._server.should_exit = True

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once the server has ended, by `stop` or by itself."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with self._listener:
            asyncio.run(self._server.serve(sockets=[self._listener]))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()
