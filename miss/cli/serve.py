"""`miss serve`: the engine behind HTTP.

Knows flags; the server does the serving.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Args:
    """Answer over HTTP: OpenAI's protocol and /v1/vqa (research only, not for diagnosis).

    miss serve
    curl -F image=@examples/chest-xray.jpg -F question="is there a fracture?" http://127.0.0.1:8000/v1/vqa

    Logs are JSON lines on standard error, without questions, answers or names of files.
    docs/operations.md has the rest.
    """

    checkpoint: str = "miss-small"
    """A checkpoint folder, or the name of one that ships with the project."""
    precision: str = "auto"
    """auto, fp32, bf16, fp16 or int8."""
    device: str = "cpu"
    """cpu or cuda."""
    host: str = "127.0.0.1"
    """The address to bind; another than this machine's own wants a key."""
    port: int = 8000
    """0 takes any that is free."""
    api_key: str | None = None
    """The bearer token that requests must carry. MISS_API_KEY sets it out of sight of `ps`."""
    insecure: bool = False
    """Bind an address that others reach without a key."""
    threads: int = 0
    """Of the engine. 0: as many as PyTorch takes."""
    max_batch_size: int = 64
    """Questions that are worked on together."""
    max_wait_ms: float = 0.0
    """How long an idle engine waits for a batch to fill."""
    max_waiting: int = 1024
    """Questions taken on and not answered yet, before a further one gets 429."""
    timeout: float = 60.0
    """Seconds from a request's first byte to its answer; then 504."""
    header_timeout: float = 10.0
    """Seconds for a request's headers."""
    body_timeout: float = 30.0
    """Seconds for a request's body."""
    write_timeout: float = 30.0
    """Seconds for a client to read what was written to it."""
    drain_timeout: float = 30.0
    """Seconds that accepted requests are given after SIGTERM."""
    max_body_mib: float = 32.0
    """The largest body, and the largest image, in MiB."""
    cache_mib: float = 512.0
    """Of encoded images that the engine keeps, in MiB; the front keeps decoded ones in an eighth of it."""
    decoders: int = 2
    """Processes that decode images."""
    decode_timeout: float = 10.0
    """Seconds for one image."""
    allow_image_urls: tuple[str, ...] = ()
    """Hosts (name or name:port) whose https:// URLs are fetched as images; without, none is. docs/operations.md has the
    rules."""
    ray: bool = False
    """Replicas of the engine on Ray Serve (docs/ray.md); wants the extra `ray`."""
    replicas: int = 2
    """With --ray: how many."""
    ray_address: str | None = None
    """With --ray: a cluster's Ray to run them on, as ray.init takes it (auto, HOST:PORT). Default: one started here, on
    loopback, that ends with this server."""
    audit_log: Path | None = None
    """A file that gets a JSON line for each answer: who, which model, a mark of the image, how it ended."""


def main(args: Args) -> int:
    from miss import __version__
    from miss.engine.data.errors import ImageLimits
    from miss.engine.serving.server import check_exposure, serve
    from miss.engine.serving.settings import ENCODED, MIB, Settings

    names = (
        *("checkpoint", "precision", "device", "host", "port", "threads", "max_batch_size", "max_waiting", "timeout"),
        *(
            "header_timeout",
            "body_timeout",
            "write_timeout",
            "drain_timeout",
            "decoders",
            "decode_timeout",
            "audit_log",
        ),
    )
    if args.replicas < 1 or (args.ray_address is not None and not args.ray):
        raise ValueError(f"replicas: got {args.replicas}; wanted at least 1, and --ray where --ray-address is given")
    max_body = int(args.max_body_mib * MIB)
    settings = Settings(
        **{name: getattr(args, name) for name in names},
        api_key=args.api_key or os.environ.get("MISS_API_KEY") or None,
        max_wait=args.max_wait_ms / 1000,
        max_body=max_body,
        cache_bytes=int(args.cache_mib * MIB / ENCODED),
        image_hosts=args.allow_image_urls,
        ray_replicas=args.replicas if args.ray else 0,
        ray_address=args.ray_address,
        image_limits=ImageLimits(max_bytes=max(1, max_body)),
    )
    check_exposure(settings, args.insecure)

    def listening(port: int) -> None:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"miss serve: http://{host}:{port} (loading {args.checkpoint}; /ready says when)", flush=True)

    serve(settings, __version__, listening)
    print("miss serve: stopped", file=sys.stdout, flush=True)
    return 0
