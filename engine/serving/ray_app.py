"""The engine on Ray Serve: replicas on one machine or several, behind the same front.

Knows Ray: where replicas run, which one a question goes to and how Ray says that one is gone; does not know HTTP, files
of images or what an engine does inside.

Where a replica ends, Ray starts another one, and sends what comes meanwhile to the others. All questions about an image
go to one replica, by consistent hashing of its pixels, so that it is encoded once; to that one's neighbour on the ring
where it is full or gone.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from miss.engine.serving.auth import is_loopback
from miss.engine.serving.logs import LOGGER, event
from miss.engine.serving.problems import Refused
from miss.engine.serving.ray_replica import LAST_WORDS, Replica
from miss.engine.serving.settings import Settings
from miss.engine.serving.supervisor import CannotStart, Item

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
ENGINES = ("checkpoint", "precision", "device", "threads", "max_batch_size", "max_wait", "max_waiting", "hang_timeout")
SUMMED = ("waiting", "running", "answer_slots")
LOOKS_EACH, LOOK_TIMEOUT = 0.5, 5.0
REACH_TIMEOUT = 5.0
TRIES = 4


class RayEngine:
    """In the supervisor's place: `start`, `ask`, `stats`, `stop`. on_restart: told of each replica that came later."""

    def __init__(self, settings: Settings, on_restart: Callable[[], None]) -> None:
        self.settings, self._on_restart = settings, on_restart
        self.model: dict[str, Any] = {}
        self.ready = False
        self._handle: DeploymentHandle[Any] | None = None
        self._seen: set[str] = set()
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when every replica has answered its first question.

        Raises:
            CannotStart: one could not.
        """
        try:
            self._handle = await asyncio.to_thread(self._deploy)
        except (RayError, RayServeException, RuntimeError, OSError) as error:
            logging.getLogger(LOGGER).exception("ray_failed")
            wanted = "a free machine, or a cluster's address and its token"
            raise CannotStart(f"Ray cannot be started or reached here; wanted {wanted}") from error
        if threading.current_thread() is threading.main_thread():  # ours again: Ray's core has put its own before it
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        while not self.ready:
            await self._look()
        self._watching = asyncio.create_task(self._watch())

    def _deploy(self) -> "DeploymentHandle[Any]":
        """Connects to Ray, or starts it on this machine's loopback, and the replicas where they are not there yet."""
        s = self.settings
        os.environ.pop("MISS_API_KEY", None)  # not for Ray's processes
        threads = s.threads or max(1, (os.cpu_count() or 1) // s.ray_replicas)
        _hush()
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if s.ray_address is None:
            spill = {"automatic_object_spilling_enabled": False}  # pixels are never written to a disk
            cpus = s.ray_replicas * threads + 1
            ray.init("local", num_cpus=cpus, include_dashboard=False, _system_config=spill, **quiet)
            if not is_loopback(ray.util.get_node_ip_address()):
                raise CannotStart("Ray would bind to other addresses than this machine's own; was it imported before?")
        else:
            _reach(s.ray_address)
            ray.init(s.ray_address, **quiet)
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
        _hush()
        folder = Path(s.checkpoint)
        checkpoint = str(folder.resolve()) if folder.is_dir() else s.checkpoint
        given = {**{name: getattr(s, name) for name in ENGINES}, "checkpoint": checkpoint, "threads": threads}
        name = "miss-" + hashlib.sha256(repr((sorted(given.items()), s.ray_replicas)).encode()).hexdigest()[:12]
        if name in serve.status().applications:  # another front's: the same model in the same way
            return serve.get_app_handle(name)
        deployment: Any = serve.deployment(
            Replica,
            num_replicas=s.ray_replicas,
            ray_actor_options={"num_cpus": threads, "num_gpus": int(s.device == "cuda")},
            max_ongoing_requests=2 * s.max_batch_size,
            max_queued_requests=s.max_waiting,
            health_check_period_s=1.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_timeout_s=s.drain_timeout,
            max_constructor_retry_count=1,
            request_router_config={"request_router_class": ROUTER},
            logging_config={"enable_access_log": False},
        )
        try:
            return serve.run(deployment.bind(given, s.ray_address is None), name=name, route_prefix=None)
        except RuntimeError as error:
            told = [str(error), *(one.message for one in serve.status().applications[name].deployments.values())]
            said = re.findall(r"CannotStart: (.+)", "\n".join(told))
            raise CannotStart(said[-1] if said else "no replica got ready; Ray's logs say why") from None

    async def _look(self) -> list[dict[str, Any]]:
        """What each replica says of itself now; `ready` is whether any did."""
        assert self._handle is not None
        found: list[dict[str, Any]] = []
        with contextlib.suppress(TimeoutError, RayError, RayServeException):
            told = await self._handle.broadcast("look").results_async(timeout_s=LOOK_TIMEOUT, return_exceptions=True)
            found = [one for one in told if isinstance(one, dict) and one["stats"] is not None]
        if bool(found) != self.ready:
            event("engine_ready" if found else "engine_ended", replicas=len(found))
        self.ready = bool(found)
        for one in found:
            self.model = one["model"]
            if one["replica"] not in self._seen and len(self._seen) >= self.settings.ray_replicas:
                self._on_restart()
            self._seen.add(one["replica"])
        return found

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOKS_EACH)
            await self._look()

    async def ask(
        self,
        pixels: bytes,
        items: list[Item],
        timeout: float | None,
        on_text: Callable[[str], None] | None = None,
        name: str | None = None,
    ) -> list[dict[str, Any]]:
        """As `Supervisor.ask`.

        Raises:
            Refused: one of the questions has no answer.
        """
        if not self.ready or self._handle is None:
            raise Refused("not_ready")
        method, stream = ("ask", False) if on_text is None else ("stream", True)
        session = name or hashlib.sha256(pixels).hexdigest()
        handle = self._handle.options(method_name=method, stream=stream, session_id=session)
        for _ in range(TRIES):
            told = await self._told(handle.remote(pixels, items, timeout), on_text)
            if told.get("refused") != "not_ready":
                break
            await asyncio.sleep(
                LAST_WORDS
            )  # its engine has ended: nothing was begun, and soon another replica is asked
        if "answers" not in told:
            raise Refused(told.get("refused", "restarted"))
        return list(told["answers"])

    async def _told(self, response: Any, on_text: Callable[[str], None] | None) -> dict[str, Any]:
        """The last of what a replica says."""
        told: dict[str, Any] = {}
        try:
            if on_text is None:
                return dict(await response)
            async for told in response:
                if "text" in told:
                    on_text(told["text"])
            return told
        except BackPressureError:
            raise Refused("queue_full") from None
        except (RayActorError, RayServeException) as error:
            raise Refused("restarted") from error
        except RayError as error:
            logging.getLogger(LOGGER).exception("question_failed")
            raise Refused("fault") from error
        except asyncio.CancelledError:  # nobody waits for it any more
            with contextlib.suppress(RayError, RayServeException):
                response.cancel()
            raise

    async def stats(self, timeout: float = LOOK_TIMEOUT) -> dict[str, Any] | None:
        """All replicas' counts together."""
        found = [one["stats"] for one in await self._look()] if self._handle is not None else []
        if not found:
            return None
        tiers = {key: sum(one["image_tokens"][key] for one in found) for key in ("hits", "misses")}
        return {**{key: sum(one[key] for one in found) for key in SUMMED}, "image_tokens": tiers}

    async def stop(self) -> None:
        """Ends the replicas of a Ray that was started here; others' stay."""
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(ray.shutdown)


def _reach(address: str) -> None:
    """Of HOST:PORT, whether anybody listens: Ray itself goes on trying for more than three minutes.

    Raises:
        CannotStart: nobody does.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:  # auto, or another of Ray's words
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT).close()
    except (OSError, OverflowError):
        raise CannotStart(
            f"ray-address: nothing answers at {address}; wanted auto, or the HOST:PORT that `ray start --head` named"
        ) from None


def _hush() -> None:
    """Of what Ray says in this process only errors are written, and as our lines."""
    for name in ("ray", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.ERROR)
        logger.propagate = True
