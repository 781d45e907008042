"""What routes share: the engine's process, decoders, bounds, counts and the audit log, started and stopped together.

Knows the order of a request's life after its body is read; does not know routes, or what requests look like.
"""

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miss.engine.serving.admission import Admission
from miss.engine.serving.auth import Auth, is_loopback
from miss.engine.serving.bodies import NUMBER
from miss.engine.serving.gate import Exchange
from miss.engine.serving.images import ImagePool, Window, from_data_url
from miss.engine.serving.logs import Audit, event
from miss.engine.serving.metrics import Metrics
from miss.engine.serving.problems import Refused
from miss.engine.serving.remote import Fetcher
from miss.engine.serving.settings import Settings
from miss.engine.serving.supervisor import Item, Supervisor

if TYPE_CHECKING:
    from miss.engine.serving.ray_app import RayEngine

SLACK = 0.25  # the engine's own deadline comes first, and frees its slots


class Service:
    """`start`, `answer`, `stop`."""

    def __init__(self, settings: Settings, version: str) -> None:
        self.settings, self.version = settings, version
        self.metrics = Metrics()
        self.admission = Admission(settings.max_waiting, settings.max_waiting_pixels, settings.max_body_memory)
        self.auth = Auth(settings.api_key, is_loopback(settings.host))
        self.audit = Audit(settings.audit_log)
        self.supervisor = _engine(settings, self.metrics.restarts.inc)
        self.images: ImagePool | None = None
        hosts, most = settings.image_hosts, settings.image_limits.max_bytes
        self.fetcher = Fetcher(hosts, most, settings.fetch_timeout) if hosts else None
        self.weights = ""
        self.exchanges: set[int] = set()

    @property
    def about(self) -> dict[str, Any]:
        """What the engine said of itself.

        Raises:
            Refused: it was never ready yet.
        """
        if not self.supervisor.model:
            raise Refused("not_ready")
        return self.supervisor.model

    @property
    def model(self) -> str:
        """Its name, as `about`."""
        return str(self.about["name"])

    @property
    def ready(self) -> bool:
        return self.supervisor.ready and self.images is not None and not self.admission.draining

    async def start(self) -> None:
        """
        Raises:
            CannotStart: the engine could not.
        """
        hashing = asyncio.create_task(asyncio.to_thread(_hash_weights, self.settings.checkpoint))
        try:
            await self.supervisor.start()
        except BaseException:
            hashing.cancel()
            raise
        self.metrics.named(self.model, self.version, self.settings.precision)
        self.weights = await hashing
        ended = self.metrics.decoders
        images = ImagePool(self.about["preprocess"], self.settings, lambda how: ended.labels(how).inc())
        await images.start()
        self.images = images

    async def stop(self) -> None:
        self.admission.draining = True
        await self.supervisor.stop()
        if self.images is not None:
            await self.images.close()
        await asyncio.to_thread(self.audit.close)
        event("stopped")

    def deadline(self, exchange: Exchange, header: str | None, asked: float | None) -> float:
        """When a request's time is over, by the loop's clock; the server's own limit holds whatever is asked.

        Raises:
            Refused: the header is not a number above 0.
        """
        least = self.settings.timeout
        if header is not None:
            given = float(header) if NUMBER.fullmatch(header) else 0.0
            if not given > 0:
                raise Refused("bad_timeout", "X-Request-Timeout")
            least = min(least, given)
        return exchange.arrived + min(least, asked if asked is not None else least)

    async def image_at(self, url: str, exchange: Exchange, deadline: float) -> bytes:
        """The bytes of a data: URL, or of another one where its host is allowed.

        Raises:
            Refused: there are none.
        """
        if self.fetcher is None or url[:6].lower() != "https:":
            return from_data_url(url)
        if not self.supervisor.ready:
            raise Refused("not_ready")
        assert exchange.held is not None
        exchange.stage = "image"
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await self.fetcher.fetch(url, exchange.held.more)
        except TimeoutError:
            raise Refused("deadline") from None

    async def answer(
        self,
        exchange: Exchange,
        image: bytes,
        view: tuple[int | None, Window | None],
        items: list[Item],
        deadline: float,
        on_text: Callable[[str], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Answers to all items about one image, counted, and written into the audit log.

        Raises:
            Refused: there is no room, no time, the image is wrong, or one of the questions has no answer.
        """
        if not self.supervisor.ready or self.images is None:
            raise Refused("not_ready")
        size = self.about["preprocess"]["image_size"]
        with self.admission.hold(len(items), size * size):
            try:
                answers = await self._within(exchange, image, view, items, deadline, on_text)
            except Refused as error:
                self._write_down(exchange, image, error.code, [])
                raise
            except asyncio.CancelledError:
                self._write_down(exchange, image, "client_gone", [])
                raise
        exchange.later += [partial(self.metrics.answered, answer) for answer in answers]
        self._write_down(exchange, image, "answered", [round(a["score"], 6) for a in answers])
        exchange.stage = "response"
        return answers

    async def _within(
        self,
        exchange: Exchange,
        image: bytes,
        view: tuple[int | None, Window | None],
        items: list[Item],
        deadline: float,
        on_text: Callable[[str], None] | None,
    ) -> list[dict[str, Any]]:
        assert self.images is not None
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + SLACK):
                exchange.stage, start = "image", time.monotonic()
                seen = await self.images.noted(image, *view)
                exchange.later.append(partial(self.metrics.took, "image_decode_seconds", time.monotonic() - start))
                exchange.stage, left = "engine", deadline - time.monotonic()
                if left <= 0:
                    raise Refused("deadline")
                answers = await self.supervisor.ask(seen.pixels, items, left, on_text, seen.name)
                return [{**answer, "warnings": [*answer["warnings"], *seen.notes]} for answer in answers]
        except TimeoutError:
            raise Refused("deadline") from None

    def _write_down(self, exchange: Exchange, image: bytes, outcome: str, scores: list[float]) -> None:
        mark = self.audit.image(image)
        if mark is not None:
            self.audit.write(
                **{"request": exchange.id, "principal": exchange.principal, "model": self.model},
                **{"weights": self.weights, "processor": self.about["fingerprint"], "image": mark},
                **{"outcome": outcome, "scores": scores, "seconds": round(time.monotonic() - exchange.arrived, 4)},
            )


def _engine(settings: Settings, on_restart: Callable[[], None]) -> "Supervisor | RayEngine":
    """One engine, or replicas on Ray, which reads its environment when it is imported: no telemetry, and where it is
    started here no address but loopback, and a token of this run's own that stands in no file."""
    if not settings.ray_replicas:
        return Supervisor(settings, on_restart)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
    if settings.ray_address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's one way to say: the node's address is 127.0.0.1
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        from miss.engine.serving.ray_app import RayEngine
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ValueError('--ray: Ray Serve is not installed; wanted: pip install "miss-engine[ray]"') from None
    return RayEngine(settings, on_restart)


def _hash_weights(checkpoint: str) -> str:
    """SHA-256 of the checkpoint's tensors; of a name, of the one that ships."""
    shipped = Path(__file__).resolve().parents[2] / "checkpoints" / checkpoint
    for folder in (Path(checkpoint), shipped):
        if (folder / "model.safetensors").is_file():
            with open(folder / "model.safetensors", "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return ""
