"""What every request passes before a route sees it, and every answer after: who asks, how much, how long, how it ended.

Knows ASGI messages, bounds and deadlines; does not know what a route does. It reads the whole body, in bounded memory
and time, watches whether the client is still there, and ends the route's work where it is not.
"""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from miss.engine.serving.admission import Admission
from miss.engine.serving.auth import Auth
from miss.engine.serving.logs import LOGGER, event
from miss.engine.serving.metrics import Metrics
from miss.engine.serving.pages import PATHS
from miss.engine.serving.problems import ANSWERED, CANCELLED, PROBLEMS, REJECTED, Refused
from miss.engine.serving.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
INTENDED_USE = "research-only"
# Routes that take an image, whether or not a question with it: these are counted by outcome.
ASKING = frozenset({"/v1/chat/completions", "/v1/vqa", "/v1/image"})
HANDLERS = ASKING | PATHS | {"/v1/models", "/health", "/ready", "/version", "/metrics", "/openapi.json"}
DISCARDED, DISCARD_SECONDS = 8 << 20, 5.0
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
HEADERS = [
    (b"x-intended-use", INTENDED_USE.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass
class Exchange:
    """One request's life, for its route and for the log. problem: the word of how it failed. tasks: what the route has
    begun; they end with the request. later: what is counted once the answer is out. held: bytes that are, until it
    ends."""

    id: str
    path: str
    method: str
    arrived: float = field(default_factory=time.monotonic)
    principal: str = ""
    status: int = 0
    problem: str = ""
    stage: str = "body"
    complete: bool = False
    tasks: "list[asyncio.Future[Any]]" = field(default_factory=list)
    later: list[Callable[[], None]] = field(default_factory=list)
    held: "Held | None" = None

    @property
    def asks(self) -> bool:
        return self.method == "POST" and self.path in ASKING

    def outcome(self) -> str:
        if self.problem:
            return PROBLEMS[self.problem].outcome
        if not self.complete:
            return CANCELLED
        return ANSWERED if self.status < 400 else REJECTED


class Gate:
    """ASGI middleware, outside all routes and inside nothing but the server. exchanges: those under way, to count."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        auth: Auth,
        admission: Admission,
        metrics: Metrics,
        exchanges: set[int],
    ) -> None:
        self.app, self.settings, self.auth = app, settings, auth
        self.admission, self.metrics, self.exchanges = admission, metrics, exchanges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        known = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange = Exchange(known, scope["path"], scope["method"])
        scope["miss"] = exchange
        self.exchanges.add(id(exchange))
        if exchange.asks:
            self.metrics.begin()
        try:
            await self._serve(scope, headers, receive, self._sender(exchange, send))
        finally:
            self.exchanges.discard(id(exchange))
            self._conclude(exchange)

    def _sender(self, exchange: Exchange, send: Send) -> Send:
        """Adds the headers that every answer has, and ends an answer that is not read."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                own = [*HEADERS, (b"x-request-id", exchange.id.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            async with asyncio.timeout(self.settings.write_timeout):
                await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                exchange.complete = True

        return sent

    async def _serve(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["miss"]
        held = exchange.held = Held(self.admission)
        try:
            try:
                self._check(exchange, headers)
                body = await self._body(exchange, receive, held)
                await self._run(scope, body, receive, send)
            except Refused as error:
                if exchange.stage == "body" and not error.problem.closes:
                    await _discard(receive)
                await refuse(error, scope, receive, send)
            except asyncio.CancelledError:  # by the server itself: its time to drain is over
                await refuse(Refused("draining"), scope, receive, send)
            except TimeoutError:  # of writing: nobody reads
                exchange.problem = exchange.problem or "client_gone"
            except Exception:  # a fault of ours: it costs this request, says nothing of itself, and is written down
                logging.getLogger(LOGGER).exception("request_failed", extra={"miss": {"request": exchange.id}})
                await refuse(Refused("internal"), scope, receive, send)
        finally:
            held.free()

    def _check(self, exchange: Exchange, headers: dict[bytes, bytes]) -> None:
        exchange.principal = self.auth.check(exchange.path, headers)
        if exchange.asks and self.admission.draining:
            raise Refused("draining")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refused("content_encoded")
        length = headers.get(b"content-length")
        if length is not None:
            if not length.isdigit():
                raise Refused("bad_content_length")
            if int(length[:18]) > self.settings.max_body:
                raise Refused("content_too_large")

    async def _body(self, exchange: Exchange, receive: Receive, held: "Held") -> bytes:
        """The whole body, counted as it comes, whatever was declared.

        Raises:
            Refused: it is too large or too slow, memory for it is short, or the client went away.
        """
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused("client_gone")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    exchange.stage = "body" if more else "admission"
                    size += len(part)
                    if size > self.settings.max_body:
                        raise Refused("content_too_large")
                    held.more(len(part))
                    parts.append(part)
                    if not more:
                        return b"".join(parts)
        except TimeoutError:
            raise Refused("request_timeout") from None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The route, until it is done or nobody waits for it."""
        exchange: Exchange = scope["miss"]
        gone, given = asyncio.Event(), False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        route, watch = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(leave())
        try:
            await asyncio.wait({route, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not route.done() and not exchange.complete:
                gone.set()
                route.cancel()
                exchange.problem = "client_gone"
                with contextlib.suppress(asyncio.CancelledError):
                    await route
            else:
                await route
        finally:
            watch.cancel()
            if not route.done():  # the server itself ends this request: its time to drain is over
                route.cancel()
                exchange.problem = exchange.problem or "draining"
            for task in exchange.tasks:
                task.cancel()
            await asyncio.gather(*exchange.tasks, return_exceptions=True)

    def _conclude(self, exchange: Exchange) -> None:
        for count in exchange.later:
            count()
        handler = exchange.path if exchange.path in HANDLERS else "other"
        method = exchange.method if exchange.method in METHODS else "other"
        status = exchange.status or 499
        self.metrics.http.labels(handler, method, str(status)).inc()
        outcome, code = exchange.outcome(), exchange.problem or str(status)
        if exchange.asks:
            self.metrics.end(outcome, code, exchange.stage, exchange.arrived)
        seconds = round(time.monotonic() - exchange.arrived, 4)
        event("request", request=exchange.id, handler=handler, method=method, status=status, problem=exchange.problem,
              outcome=outcome, seconds=seconds)  # fmt: skip


async def _discard(receive: Receive) -> None:
    """Reads what a refused client still sends, up to a bound: a connection that is closed over it loses the answer."""
    left = DISCARDED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


class Held:
    """Bytes of one request's body that are held."""

    def __init__(self, admission: Admission) -> None:
        self.bodies, self.size = admission.bodies, 0

    def more(self, size: int) -> None:
        """
        Raises:
            Refused: all bodies together are more than may be held.
        """
        self.bodies.take(size)
        self.size += size

    def free(self) -> None:
        self.bodies.free(self.size)
        self.size = 0


async def refuse(error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with a problem, where nothing has been answered yet and somebody is there."""
    exchange: Exchange = scope["miss"]
    exchange.problem = exchange.problem or error.code
    if exchange.status or error.problem.status == 499:
        return
    body = {"error": {**error.body()["error"], "request_id": exchange.id}}
    response = JSONResponse(body, error.problem.status, error.headers())
    with contextlib.suppress(TimeoutError):  # nobody reads
        await response(scope, receive, send)
