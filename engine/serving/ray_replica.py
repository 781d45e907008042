"""One replica on Ray Serve: it supervises an engine's process as the front does without Ray, and ends with it.

Knows its engine and the one port that Ray opens for it; does not know where it runs, or which questions come to it.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

import ray.serve._private.replica as ray_replica
from ray import serve

from miss.engine.serving.problems import Refused
from miss.engine.serving.settings import Settings
from miss.engine.serving.supervisor import Item, Supervisor

LAST_WORDS = 0.2  # seconds in which a replica whose engine ended still tells those who waited


class Replica:
    """One engine. What has no answer is told as a word: an exception would be written into Ray's log."""

    async def __init__(self, given: dict[str, Any], loopback: bool) -> None:  # type: ignore[misc]
        if loopback:  # Ray opens a port for each replica, on all addresses unless it is told here, and after this
            bind = ray_replica.add_port_to_grpc_server
            ray_replica.add_port_to_grpc_server = lambda server, _: bind(server, "127.0.0.1:0")
        self.supervisor = Supervisor(Settings(**given), self._end)
        await self.supervisor.start()

    def _end(self) -> None:
        asyncio.get_running_loop().call_later(LAST_WORDS, os._exit, 1)

    def check_health(self) -> None:
        if not self.supervisor.ready:
            raise RuntimeError("the engine has ended")

    async def look(self) -> dict[str, Any]:
        name = serve.get_replica_context().replica_id.unique_id
        return {"replica": name, "model": self.supervisor.model, "stats": await self.supervisor.stats()}

    async def ask(self, pixels: bytes, items: list[Item], timeout: float | None) -> dict[str, Any]:
        try:
            return {"answers": await self.supervisor.ask(pixels, items, timeout)}
        except Refused as error:
            return {"refused": error.code}

    async def stream(self, pixels: bytes, items: list[Item], timeout: float | None) -> AsyncGenerator[dict[str, Any]]:
        texts: asyncio.Queue[str | None] = asyncio.Queue()
        asking = asyncio.ensure_future(self.supervisor.ask(pixels, items, timeout, texts.put_nowait))
        asking.add_done_callback(lambda _: texts.put_nowait(None))
        try:
            while (text := await texts.get()) is not None:
                yield {"text": text}
            yield {"answers": await asking}
        except Refused as error:
            yield {"refused": error.code}
        finally:
            asking.cancel()
