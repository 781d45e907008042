"""`POST /v1/chat/completions`: OpenAI's protocol, whole answers and streams.

Knows this route's request and responses; does not know how answers are made.

A stream holds only what is final. Greedy and sampled answers come word by word: the last word is held back until the
next begins, for a token may still join it. Beams and lists of answers come as one piece.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from miss.engine.serving.asking import parameters, question_of
from miss.engine.serving.bodies import read_json
from miss.engine.serving.gate import INTENDED_USE, Exchange
from miss.engine.serving.images import Window
from miss.engine.serving.problems import Refused
from miss.engine.serving.protocol import ChatRequest
from miss.engine.serving.service import Service
from miss.engine.serving.supervisor import Item

Answer = dict[str, Any]


async def chat(request: Request, service: Service) -> Response:
    """
    Raises:
        Refused: there is no answer.
    """
    exchange: Exchange = request.scope["miss"]
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("unsupported_media_type")
    asked = read_json(ChatRequest, await request.body())
    if asked.model != service.model:
        raise Refused("model_not_found", "model")
    question, url, warnings = question_of(asked)
    deadline = service.deadline(exchange, request.headers.get("x-request-timeout"), asked.timeout)
    image = await service.image_at(url, exchange, deadline)
    item = Item(question, _parameters(asked, service))
    window = None if asked.window is None else (asked.window[0], asked.window[1])
    told = Chat(asked, service, exchange, warnings)
    if asked.stream:
        return await told.streamed(image, (asked.frame, window), item, deadline)
    answers = await service.answer(exchange, image, (asked.frame, window), [item], deadline)
    return JSONResponse(told.whole(answers[0]))


def _parameters(asked: ChatRequest, service: Service) -> dict[str, Any]:
    """`n` choices are the answer and its alternatives: further draws, beams, or next best ones."""
    number, length = asked.n or 1, asked.max_completion_tokens or asked.max_tokens
    params = parameters(asked, length, number - 1, service.about["answer_length"], service.settings)
    beams = asked.num_beams or service.about["num_beams"]
    if number > 1 and 1 < beams < number:
        raise Refused("bad_request", "n", "With beams there are at most as many choices as beams.")
    if asked.top_logprobs:
        if not asked.logprobs:
            raise Refused("bad_request", "top_logprobs", "They come with `logprobs` true.")
        if beams > 1 or any(params.get(name) for name in ("candidates", "constrain", "temperature")):
            raise Refused("unsupported", "top_logprobs", "They are offered for greedy answers (num_beams 1).")
        params["top_logprobs"] = asked.top_logprobs
    return params


class Chat:
    """One request's answer in OpenAI's words."""

    def __init__(self, asked: ChatRequest, service: Service, exchange: Exchange, warnings: list[str]) -> None:
        self.asked, self.service, self.exchange, self.warnings = asked, service, exchange, warnings
        self.head = {"id": f"chatcmpl-{exchange.id}", "created": int(time.time()), "model": service.model}

    def whole(self, answer: Answer) -> Answer:
        message = {"role": "assistant", "refusal": None}
        choices = [
            {
                "index": index,
                "message": {**message, "content": choice["text"]},
                "logprobs": self.logprobs(choice),
                "finish_reason": _reason(choice),
            }
            for index, choice in enumerate(self.choices(answer))
        ]
        rest = {"usage": self.usage(answer), "miss": self.details(answer)}
        return {**self.head, "object": "chat.completion", "choices": choices, **rest}

    def choices(self, answer: Answer) -> list[Answer]:
        return [answer, *answer["alternatives"]][: self.asked.n or 1]

    def usage(self, answer: Answer) -> dict[str, int]:
        prompt = answer["prompt_tokens"]
        made = sum(len(choice["token_ids"]) for choice in self.choices(answer))
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def details(self, answer: Answer) -> dict[str, Any]:
        """What OpenAI's protocol has no place for."""
        return {
            "scores": [choice["score"] for choice in self.choices(answer)],
            "logprobs": [choice["logprob"] for choice in self.choices(answer)],
            "warnings": [*self.warnings, *answer["warnings"]],
            "seconds": answer["seconds"],
            "intended_use": INTENDED_USE,
        }

    def logprobs(self, choice: Answer) -> dict[str, Any] | None:
        """By WordPiece, as the model's vocabulary writes it. None where only their sum is known (a list of answers)."""
        if not self.asked.logprobs or choice["token_logprobs"] is None:
            return None
        tops = choice["top_logprobs"] or [[] for _ in choice["tokens"]]
        content = [
            {**_token(text, logprob), "top_logprobs": [_token(*one) for one in top]}
            for text, logprob, top in zip(choice["tokens"], choice["token_logprobs"], tops, strict=True)
        ]
        return {"content": content, "refusal": None}

    async def streamed(
        self, image: bytes, view: tuple[int | None, Window | None], item: Item, deadline: float
    ) -> StreamingResponse:
        """A stream, once there is something to send: until then what goes wrong has a status of its own."""
        texts: asyncio.Queue[str | None] = asyncio.Queue()
        ask = self.service.answer(self.exchange, image, view, [item], deadline, texts.put_nowait)
        answering = asyncio.ensure_future(ask)
        self.exchange.tasks.append(answering)
        answering.add_done_callback(lambda _: texts.put_nowait(None))
        first = await texts.get()
        if first is None:
            await answering  # raises what went wrong; an answer of one piece is there
        name = "time_to_first_token_seconds"
        self.service.metrics.took(name, time.monotonic() - self.exchange.arrived)
        return StreamingResponse(self._lines(first, texts, answering), media_type="text/event-stream")

    async def _lines(
        self, text: str | None, texts: "asyncio.Queue[str | None]", answering: "asyncio.Future[list[Answer]]"
    ) -> AsyncGenerator[bytes, None]:
        sent = ""
        try:
            yield self.chunk(0, {"role": "assistant", "content": ""})
            while text is not None:
                safe = text[: text.rfind(" ") + 1].rstrip(" ")
                if len(safe) > len(sent) and safe.startswith(sent):
                    yield self.chunk(0, {"content": safe[len(sent) :]})
                    sent = safe
                text = await texts.get()
            answer = (await answering)[0]
            for line in self._last(answer, sent):
                yield line
        except Refused as error:
            self.exchange.problem = error.code
            yield _line(error.body())

    def _last(self, answer: Answer, sent: str) -> list[bytes]:
        if not answer["text"].startswith(sent):
            raise Refused("internal")
        lines = []
        for index, choice in enumerate(self.choices(answer)):
            delta = {"content": choice["text"][len(sent) :] if index == 0 else choice["text"]}
            if index:
                lines.append(self.chunk(index, {"role": "assistant", "content": ""}))
            lines.append(self.chunk(index, delta, self.logprobs(choice)))
            lines.append(self.chunk(index, {}, None, _reason(choice)))
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            rest = {"choices": [], "usage": self.usage(answer), "miss": self.details(answer)}
            lines.append(_line({**self.head, "object": "chat.completion.chunk", **rest}))
        return [*lines, b"data: [DONE]\n\n"]

    def chunk(
        self, index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return _line({**self.head, "object": "chat.completion.chunk", "choices": [choice]})


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _reason(choice: Answer) -> str:
    return "stop" if choice["finished"] else "length"


def _line(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
