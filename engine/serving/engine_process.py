"""The process that holds the model: it reads questions from a socket and writes answers to it.

Knows frames and the engine; does not know HTTP, files of images or who asks. It ends when the socket does, so that it
never outlives the server that started it, however that ends.
"""

import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from miss.engine.data.processor import QuestionError
from miss.engine.runtime.answers import Answer
from miss.engine.runtime.attention_maps import AttentionMaps
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.engine import Engine
from miss.engine.runtime.image_source import NamedImage, PixelsWanted
from miss.engine.runtime.many import outcome
from miss.engine.runtime.request import EngineFault, Request, RequestError, State
from miss.engine.runtime.sampler import SamplingParams
from miss.engine.runtime.stepper import Stepper
from miss.engine.serving import frames, logs


class EngineServer:
    """Answers what comes over one connection. `handle` is called by the thread that reads; answers are written by the
    one that steps, as soon as they are there: another one between them, or an event loop, costs a wake-up each."""

    def __init__(self, stepper: Stepper, sock: socket.socket) -> None:
        self.stepper, self.engine, self._sock = stepper, stepper.engine, sock
        self._requests: dict[int, Request] = {}
        self._writing = threading.Lock()

    def handle(self, message: dict[str, Any], data: bytearray) -> None:
        if message["op"] == "ask":
            self._ask(message, data)
        elif message["op"] == "cancel":
            for number in message["ids"]:
                request = self._requests.get(number)
                if request is not None:
                    self.stepper.cancel(request)
        elif message["op"] == "stats":
            self.send(op="stats", id=message["id"], stats=self.engine.stats.to_dict())

    def _ask(self, message: dict[str, Any], data: bytearray) -> None:
        """Takes up all questions of a frame, so that they are encoded together."""
        pixels = np.frombuffer(data, np.uint8).reshape(message["shape"]) if data else None
        image, items = NamedImage(bytes.fromhex(message["image"]), pixels), message["items"]
        if pixels is None and not self.engine.intake.needs_no_pixels(self.engine.intake.reader.key(image)[0]):
            self.send(op="pixels", ids=[item["id"] for item in items])
            return
        asked = [(item, params) for item in items if (params := self._params(item)) is not None]
        self.stepper.expect(len(asked))
        for item, params in asked:
            self._add(item, params, image, message["timeout"], message["stream"])

    def _params(self, item: dict[str, Any]) -> SamplingParams | None:
        try:
            return SamplingParams(**item["params"])
        except ValueError as error:
            self.send(op="error", id=item["id"], code=word(error))
        except Exception:  # a fault of ours: it ends this question and no other
            self._fault(item["id"])
        return None

    def _add(
        self, item: dict[str, Any], params: SamplingParams, image: NamedImage, timeout: float | None, stream: bool
    ) -> None:
        number = item["id"]
        grown, done = partial(self._grown, number) if stream else None, partial(self._done, item, image)
        try:
            request = self.stepper.add(image, item["question"], params, timeout, grown, done)
        except PixelsWanted:  # they were let go of just now
            self.send(op="pixels", ids=[number])
        except ValueError as error:
            self.send(op="error", id=number, code=word(error))
        except Exception:
            self._fault(number)
        else:
            self._requests[number] = request
            if request.done:  # before it stood there
                self._requests.pop(number, None)

    def _grown(self, number: int, request: Request) -> None:
        """Sends the text each time that it has grown."""
        self.send(op="text", id=number, text=self.engine.processor.decode(request.token_ids))

    def _done(self, item: dict[str, Any], image: NamedImage, request: Request) -> None:
        number = item["id"]
        self._requests.pop(number, None)
        if request.state is State.CANCELLED:  # nobody waits for it
            return
        try:
            answer = outcome(request)
            tokens = len(request.question_ids)
            told = {"op": "answer", "id": number, "answer": self._shown(answer), "prompt_tokens": tokens}
            if item["look"]:
                assert image.pixels is not None, "they are always sent with a question that looks"
                looking = self.stepper.look(image.pixels, item["question"], answer.token_ids)
                looking.add_done_callback(partial(self._looked, told))
            else:
                self.send(**told)
        except ValueError as error:
            self.send(op="error", id=number, code=word(error))
        except Exception:
            self._fault(number)

    def _looked(self, told: dict[str, Any], looking: "Future[AttentionMaps]") -> None:
        try:
            told["answer"]["attention"] = as_lists(looking.result())
            self.send(**told)
        except ValueError as error:
            self.send(op="error", id=told["id"], code=word(error))
        except Exception:
            self._fault(told["id"])

    def _fault(self, number: int) -> None:
        logging.getLogger(logs.LOGGER).exception("question_failed")
        self.send(op="error", id=number, code="fault")

    def _shown(self, answer: Answer) -> dict[str, Any]:
        """An answer's fields, and its tokens as the vocabulary writes them."""
        shown, tokenizer = answer.to_dict(), self.engine.processor.tokenizer
        for one in (shown, *shown["alternatives"]):
            one["tokens"] = [tokenizer.id_to_token(token) or "" for token in one["token_ids"]]
            for top in one["top_logprobs"] or ():
                top[:] = [(tokenizer.id_to_token(token) or "", logprob) for token, logprob in top]
        return shown

    def send(self, **message: Any) -> None:
        with self._writing, contextlib.suppress(OSError):  # the server is gone: the thread that reads ends all
            frames.send(self._sock, message)


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


def serve(sock: socket.socket, given: dict[str, Any]) -> None:
    """Loads, answers one blank image to be warm, says so, and goes on until the socket ends."""
    try:
        config = EngineConfig(**given["config"])
        load = partial(Engine.load, given["checkpoint"], given["precision"], given["device"], config)
        stepper = Stepper(load, given["max_wait"])
        _warm(stepper)
    except (ValueError, OSError) as error:  # the one who starts the server reads it; no request has come yet
        frames.send(sock, {"op": "failed", "message": " ".join(str(error).split())})
        return
    settle()
    server = EngineServer(stepper, sock)
    server.send(op="ready", **describe(stepper.engine))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            server.handle(*frames.receive(sock))


def _warm(stepper: Stepper) -> None:
    """
    Raises:
        ValueError: it cannot answer.
    """
    answered: Future[Request] = Future()
    params = SamplingParams(num_alternatives=0)
    stepper.expect()
    stepper.add(stepper.engine.processor.blank, "is this image normal?", params, on_done=answered.set_result)
    outcome(answered.result())


def main() -> None:
    """Arguments: the socket's descriptor, and JSON."""
    sock, given = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    for name in (signal.SIGINT, signal.SIGTERM):  # the server's to handle: it closes the socket when all is answered
        signal.signal(name, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold images and questions
    logs.configure()
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    serve(sock, given)
    sys.stdout.flush()
    os._exit(0)  # whatever still runs is asked for by nobody


if __name__ == "__main__":
    main()
