"""`python -m tests.fuzz.request -max_total_time=600`: any bytes as the body of a question.

Knows that only Refused may come of it; does not know the engine.
"""

import asyncio
import json

from tests.fuzz.harness import fuzz, instrumented

with instrumented(__name__, "miss.engine.serving", "python_multipart", "starlette.formparsers"):
    from starlette.datastructures import Headers

    from miss.engine.serving.asking import parameters, question_of
    from miss.engine.serving.bodies import read_form, read_json
    from miss.engine.serving.images import from_base64, from_data_url
    from miss.engine.serving.problems import Refused
    from miss.engine.serving.protocol import ChatRequest, VqaForm, VqaRequest
    from miss.engine.serving.settings import Settings

SETTINGS = Settings()
HEADERS = Headers({"content-type": "multipart/form-data; boundary=x"})


def chat(data: bytes) -> None:
    asked = read_json(ChatRequest, data)
    question, url, _ = question_of(asked)
    from_data_url(url)
    json.dumps(parameters(asked, asked.max_tokens, (asked.n or 1) - 1, 40, SETTINGS) | {"question": question})


def vqa(data: bytes) -> None:
    asked = read_json(VqaRequest, data)
    from_base64(asked.image)
    json.dumps(parameters(asked, asked.max_new_tokens, asked.alternatives, 40, SETTINGS))


def form(data: bytes) -> None:
    asked, image = asyncio.run(read_form(VqaForm, HEADERS, data))
    assert isinstance(image, bytes) and all(isinstance(q, str) for q in asked.question)
    json.dumps(parameters(asked, asked.max_new_tokens, asked.alternatives, 40, SETTINGS))


def one_input(data: bytes) -> None:
    """The first byte chooses the route and the kind of body. What gets through must be JSON for the engine."""
    try:
        (chat, vqa, form)[(data[0] if data else 0) % 3](data[1:])
    except Refused as error:
        told = json.dumps(error.body())
        assert "Traceback" not in told and "0x" not in told


if __name__ == "__main__":
    fuzz(one_input, "request")
