"""The plain server that people write: FastAPI, one question a request, one model call a request in the thread pool.

    python -m miss.benchmarks.peers.fastapi_server CHECKPOINT WORK --port 8001 --threads 2 --at-once 1

Knows FastAPI; does not know who asks. `--at-once`: how many of its threads there are; the rest wait their turn.
"""

import argparse
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from miss.benchmarks.peers.served_blip import ServedBlip


class Ask(BaseModel):
    image: str
    question: str


def create_app(model: ServedBlip, at_once: int) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = at_once
        yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/answer")
    def answer(ask: Ask) -> dict[str, str]:
        return {"answer": model.answer([model.read(base64.b64decode(ask.image), ask.question)])[0]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=40)
    args = parser.parse_args()
    app = create_app(ServedBlip(args.checkpoint, args.work, args.threads), args.at_once)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
