"""What a server is told when it starts: the model, its bounds and its deadlines.

Knows numbers and their limits; does not know HTTP, flags or models.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from miss.engine.data.errors import ImageLimits

MIB = 1 << 20
ENCODED = 8
MAY_BE_ZERO = frozenset({"threads", "port", "max_wait", "cache_bytes", "drain_timeout", "ray_replicas"})


@dataclass(frozen=True)
class Settings:
    """Times in seconds, sizes in bytes.

    max_batch_size: questions that the engine works on together. max_wait: how long an idle engine waits for a batch to
        fill; one that works takes new questions in between steps, without waiting.
    max_waiting, max_waiting_pixels: questions, and pixels of their decoded images, that have been taken on and are not
        answered yet. max_body_memory: of all request bodies that are held at a time.
    cache_bytes: of decoded images kept, by content; the engine keeps ENCODED times as much of encoded ones.
    header_timeout, body_timeout, write_timeout: how long a client may take to send and to read.
    timeout: of a request, from its first byte to its answer; a request may ask for less.
    drain_timeout: what accepted requests are given after SIGTERM.
    hang_timeout: of an engine that has work and makes no progress, before it is started anew.
    image_hosts, fetch_timeout: whose https URLs are fetched as images, and how long one may take; none without.
    ray_replicas: engines on Ray Serve; 0: one engine, without Ray. ray_address: a cluster's; None starts Ray here.
    """

    checkpoint: str = "miss-small"
    precision: str = "auto"
    device: str = "cpu"
    threads: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_batch_size: int = 64
    max_wait: float = 0.0
    max_questions: int = 64
    max_candidates: int = 1024
    max_waiting: int = 1024
    max_waiting_pixels: int = 1 << 26
    max_body: int = 32 * MIB
    max_body_memory: int = 512 * MIB
    cache_bytes: int = 64 * MIB
    decoders: int = 2
    decode_timeout: float = 10.0
    decode_memory: int = 2048 * MIB
    image_limits: ImageLimits = ImageLimits(max_bytes=32 * MIB)
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keep_alive: float = 15.0
    timeout: float = 60.0
    drain_timeout: float = 30.0
    hang_timeout: float = 120.0
    image_hosts: tuple[str, ...] = ()
    fetch_timeout: float = 10.0
    audit_log: Path | None = None
    ray_replicas: int = 0
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            least = 0 if one.name in MAY_BE_ZERO else 1e-3
            if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < 1e15:
                wanted = "a number of at least 0" if least == 0 else "a number above 0"
                raise ValueError(f"{one.name.replace('_', '-')}: got {value!r}; wanted {wanted}")
        if self.port > 65535:
            raise ValueError(f"port: got {self.port}; wanted 0 (any that is free) to 65535")
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii() or " " in self.api_key):
            raise ValueError("api-key: wanted at least 8 ASCII characters without spaces; choose a longer one")
