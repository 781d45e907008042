"""`POST /v1/vqa`: one image, one question or several, answers with scores, alternatives and warnings.

Knows this route's request and response; does not know how answers are made.
"""

import time

from starlette.requests import Request

from miss.engine.serving.asking import parameters
from miss.engine.serving.bodies import read_form, read_json
from miss.engine.serving.gate import INTENDED_USE, Exchange
from miss.engine.serving.images import from_base64
from miss.engine.serving.problems import Refused
from miss.engine.serving.protocol import VqaForm, VqaRequest, VqaResponse, answer_of
from miss.engine.serving.service import Service
from miss.engine.serving.supervisor import Item


async def vqa(request: Request, service: Service) -> VqaResponse:
    """
    Raises:
        Refused: there is no answer.
    """
    exchange: Exchange = request.scope["miss"]
    asked, questions, given = await _read(request)
    if len(questions) > service.settings.max_questions:
        raise Refused("bad_request", "questions", f"Accepted: up to {service.settings.max_questions} questions.")
    deadline = service.deadline(exchange, request.headers.get("x-request-timeout"), asked.timeout)
    image = await service.image_at(given, exchange, deadline) if isinstance(given, str) else given
    longest = service.about["answer_length"]
    params = parameters(asked, asked.max_new_tokens, asked.alternatives, longest, service.settings)
    window = None if asked.window is None else (asked.window[0], asked.window[1])
    items = [Item(question, params, asked.attention_map) for question in questions]
    answers = await service.answer(exchange, image, (asked.frame, window), items, deadline)
    prompt, generated = sum(a["prompt_tokens"] for a in answers), sum(len(a["token_ids"]) for a in answers)
    return VqaResponse(
        id=exchange.id,
        model=service.model,
        intended_use=INTENDED_USE,
        answers=[answer_of(answer) for answer in answers],
        usage={"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
        seconds=round(time.monotonic() - exchange.arrived, 6),
    )


async def _read(request: Request) -> tuple[VqaRequest | VqaForm, list[str], bytes | str]:
    """The request, its questions and its image's bytes or URL, out of JSON or a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if kind == "multipart/form-data":
        form, image = await read_form(VqaForm, request.headers, body)
        if not image:
            raise Refused("image_empty", "image")
        return form, form.question, image
    if kind != "application/json":
        raise Refused("unsupported_media_type")
    asked = read_json(VqaRequest, body)
    if (asked.question is None) == (asked.questions is None):
        raise Refused("bad_request", "question", "Give `question` or `questions`, and not both.")
    questions = [asked.question] if asked.question is not None else asked.questions or []
    is_url = asked.image[:5].lower() == "data:" or "://" in asked.image[:16]
    return asked, questions, asked.image if is_url else from_base64(asked.image)
