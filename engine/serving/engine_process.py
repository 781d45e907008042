"""The process that holds the model: it reads questions from a socket and writes answers to it.

Knows frames and the engine; does not know HTTP, files of images or who asks. It ends when the socket does, so that it
never outlives the server that started it, however that ends.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Coroutine
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from miss.engine.data.processor import QuestionError
from miss.engine.runtime.answers import Answer
from miss.engine.runtime.async_engine import AsyncEngine
from miss.engine.runtime.attention_maps import AttentionMaps
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.engine import Engine
from miss.engine.runtime.request import EngineFault, RequestError
from miss.engine.runtime.sampler import SamplingParams
from miss.engine.serving import frames, logs


class EngineServer:
    """Answers what comes over one connection; each question is a task that a `cancel` ends."""

    def __init__(self, front: AsyncEngine, writer: asyncio.StreamWriter) -> None:
        self.front, self.engine, self._writer = front, front.engine, writer
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def handle(self, message: dict[str, Any], data: bytes) -> None:
        if message["op"] == "ask":
            pixels = np.frombuffer(bytearray(data), np.uint8).reshape(message["shape"])
            for item in message["items"]:
                self._start(item["id"], self._ask(item, pixels, message["timeout"], message["stream"]))
        elif message["op"] == "cancel":
            for number in message["ids"]:
                if number in self._tasks:
                    self._tasks[number].cancel()
        elif message["op"] == "stats":
            self._send(op="stats", id=message["id"], stats=self.engine.stats.to_dict())

    def _start(self, number: int, ask: Coroutine[Any, Any, None]) -> None:
        """Forgotten when the task ends, not by the coroutine: one that is cancelled before its first step never runs
        (its question and its cancellation came together), and kept its pixels for ever."""
        task = self._tasks[number] = asyncio.get_running_loop().create_task(ask)
        task.add_done_callback(lambda _: self._tasks.pop(number))

    async def _ask(self, item: dict[str, Any], pixels: np.ndarray, timeout: float | None, stream: bool) -> None:
        number = item["id"]
        try:
            params = SamplingParams(**item["params"])
            tokens = len(self.engine.processor.encode_question(item["question"]).ids)
            asked = (pixels, item["question"], params, timeout)
            answer = await (self._stream(number, *asked) if stream else self.front.answer(*asked))
            shown = self._shown(answer)
            if item["look"]:
                shown["attention"] = as_lists(await self.front.look(pixels, item["question"], answer.token_ids))
            self._send(op="answer", id=number, answer=shown, prompt_tokens=tokens)
        except ValueError as error:
            self._send(op="error", id=number, code=word(error))
        except Exception:  # a fault of ours: it ends this question and no other
            logging.getLogger(logs.LOGGER).exception("question_failed")
            self._send(op="error", id=number, code="fault")

    async def _stream(self, number: int, *asked: Any) -> Answer:
        """Sends the text each time that it has grown."""
        async with contextlib.aclosing(self.front.stream(*asked)) as events:
            async for event in events:
                if event.answer is not None:
                    return event.answer
                self._send(op="text", id=number, text=event.text)
        raise AssertionError("the last event holds the answer")

    def _shown(self, answer: Answer) -> dict[str, Any]:
        """An answer's fields, and its tokens as the vocabulary writes them."""
        shown, tokenizer = answer.to_dict(), self.engine.processor.tokenizer
        for one in (shown, *shown["alternatives"]):
            one["tokens"] = [tokenizer.id_to_token(token) or "" for token in one["token_ids"]]
            for top in one["top_logprobs"] or ():
                top[:] = [(tokenizer.id_to_token(token) or "", logprob) for token, logprob in top]
        return shown

    def _send(self, **message: Any) -> None:
        frames.write(self._writer, message)


def as_lists(maps: AttentionMaps) -> dict[str, Any]:
    """Maps as JSON has them: shares of attention, six digits."""
    return {
        "tokens": maps.tokens,
        "maps": np.round(maps.maps, 6).tolist(),
        "elsewhere": np.round(maps.elsewhere, 6).tolist(),
    }


def word(error: ValueError) -> str:
    """A word of PROBLEMS for what the engine refused or could not do."""
    if isinstance(error, QuestionError):
        return "bad_question"
    if isinstance(error, RequestError):
        known = {"queue_full", "deadline", "out_of_memory", "invalid", "fault", "closed", "cancelled"}
        code = error.code if error.code in known else "fault"
        return {"closed": "draining", "cancelled": "client_gone"}.get(code, code)
    return "fault" if isinstance(error.__cause__, EngineFault) else "invalid"


def describe(engine: Engine) -> dict[str, Any]:
    """What the server tells of its model, and decodes images by."""
    return {
        "name": engine.name,
        "preprocess": asdict(engine.processor.preprocess),
        "fingerprint": engine.processor.fingerprint,
        "answer_length": engine.config.answer_length,
        "num_beams": engine.model.config.generation.num_beams,
        "max_question_tokens": engine.processor.max_question_length,
        "notes": list(engine.notes),
        "load_seconds": engine.load_seconds,
    }


def settle() -> None:
    """Tells the collector that what is loaded by now stays.

    It looks through all objects only when a quarter as many have joined them: of torch's and ours 47,000, before which
    what is left of failed questions (an error and the frames that it came through hold each other) is not freed. Now
    it does after some thousand, and its 0.1 s, in which nobody is answered, is spent here.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # the quarter is of what this one leaves


async def serve(sock: socket.socket, given: dict[str, Any]) -> None:
    """Loads, answers one blank image to be warm, says so, and goes on until the socket ends."""
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 20)
    try:
        config = EngineConfig(**given["config"])
        load = partial(Engine.load, given["checkpoint"], given["precision"], given["device"], config)
        front = AsyncEngine(load, max_wait=given["max_wait"])
        engine = front.engine
        await front.answer(engine.processor.blank, "is this image normal?", SamplingParams(num_alternatives=0))
    except (ValueError, OSError) as error:  # the one who starts the server reads it; no request has come yet
        frames.write(writer, {"op": "failed", "message": " ".join(str(error).split())})
        await writer.drain()
        return
    settle()
    server = EngineServer(front, writer)
    frames.write(writer, {"op": "ready", **describe(engine)})
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            server.handle(*await frames.read(reader))


def main() -> None:
    """Arguments: the socket's descriptor, and JSON."""
    sock, given = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    for name in (signal.SIGINT, signal.SIGTERM):  # the server's to handle: it closes the socket when all is answered
        signal.signal(name, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold images and questions
    logs.configure()
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    asyncio.run(serve(sock, given))
    sys.stdout.flush()
    os._exit(0)  # whatever still runs is asked for by nobody


if __name__ == "__main__":
    main()
