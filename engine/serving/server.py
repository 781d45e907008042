"""The server: uvicorn, with a way to stop that leaves nobody unanswered.

Knows its listening socket and signals; does not know routes.
"""

import asyncio
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from miss.engine.serving import logs
from miss.engine.serving.app import create_app
from miss.engine.serving.auth import is_loopback
from miss.engine.serving.connection import protocol
from miss.engine.serving.settings import Settings

LOOP = "asyncio" if sys.platform == "win32" else "uvloop"  # there is no uvloop for Windows
LAST_WORDS = 0.2  # seconds in which those who ask a server that stops are told so


class Server(uvicorn.Server):
    """On a first SIGTERM or SIGINT it takes no new work (503) and stops when what it has taken on is answered, or the
    time to drain is over; on a second one at once. on_listening: told the port."""

    def __init__(self, settings: Settings, version: str, on_listening: Callable[[int], None] | None = None) -> None:
        self.app = create_app(settings, version, self._fail)
        self.settings, self._on_listening = settings, on_listening
        self._draining_since: float | None = None
        options: dict[str, Any] = {
            **{"http": protocol(settings.header_timeout, settings.write_timeout), "ws": "none"},
            **{"host": settings.host, "port": settings.port},
            # uvloop starts processes by a fork, on which Ray's gRPC prints a line each time; asyncio by vfork.
            **{"loop": "asyncio" if settings.ray_replicas else LOOP},
            **{"lifespan": "on", "log_config": None, "access_log": False, "server_header": False},
            **{"proxy_headers": False, "backlog": 4096},
            **{"timeout_keep_alive": settings.keep_alive, "timeout_graceful_shutdown": 2},
        }
        super().__init__(uvicorn.Config(self.app, **options))

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        logs.event("listening", port=port)
        if self._on_listening is not None:
            self._on_listening(port)

    def _fail(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining_since is not None:
            self.should_exit = self.force_exit = True
        self.drain()

    def drain(self) -> None:
        """Takes no new work, and stops when the last is done."""
        self.app.state.service.admission.draining = True
        self._draining_since = self._draining_since or time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self._draining_since is not None:
            waited = time.monotonic() - self._draining_since
            if waited > self.settings.drain_timeout or (waited > LAST_WORDS and not self.app.state.service.exchanges):
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """As uvicorn's, but what was sent on a connection that stands still gets its 503 before that is closed."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_WORDS)
        await self._cut_off()
        await super().shutdown(sockets)

    async def _cut_off(self) -> None:
        """Ends what is not done: requests get their 503, then connections are closed, also those that nobody reads.
        uvicorn would do it after `timeout_graceful_shutdown`, with an error in the log."""
        if late := list(self.server_state.tasks):
            logs.event("cut_off", requests=len(late))
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=LAST_WORDS)
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(LAST_WORDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(settings: Settings, version: str, on_listening: Callable[[int], None] | None = None) -> None:
    """Serves until told to stop.

    Raises:
        ValueError: the address may not be bound so, or the engine cannot start.
        OSError: the address cannot be bound.
    """
    logs.configure()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > soft else soft, hard))
    server = Server(settings, version, on_listening)
    with _bound(settings) as sockets:
        server.run(sockets)
    if server.app.state.failure is not None:
        raise server.app.state.failure


@contextmanager
def _bound(settings: Settings) -> Iterator[list[Any]]:
    """The listening socket, bound before anything starts, so that an address in use is said at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        yield [listening]


def check_exposure(settings: Settings, insecure: bool) -> None:
    """
    Raises:
        ValueError: without a key others on the network could ask.
    """
    if settings.api_key is None and not insecure and not is_loopback(settings.host):
        raise ValueError(
            f"host: got {settings.host} without a key, so that anyone who reaches it may ask; "
            "set MISS_API_KEY or --api-key, bind to 127.0.0.1, or insist with --insecure"
        )
