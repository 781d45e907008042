"""Requests made from the OpenAPI document, as it allows and as it forbids: valid never 5xx, invalid always 4xx.

What the document says of responses is checked with each: status, media type, body.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.serving.harness import LEAKS, chat, data_url, png, read_all, wait

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
IMAGES = [png(seed, (12, 9)) for seed in range(4)]
NO_DEADLINE = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
OURS = {"bad_request", "conflicting", "question_required", "bad_question", "image_required", "too_many_images",
        "invalid", "model_not_found", "bad_form", "bad_json", "queue_full", "deadline", "unsupported"}  # fmt: skip
# Why a request that the document allows may be refused: bounds that depend on settings or on two fields together, the
# image, the model's name; bad_json: lone surrogates, which JSON allows and text does not.


WAYS = ("candidates", "constrain", "temperature", "num_beams")


def with_image(case, number):
    """The case with a whole image where it has one, the model's own name, time, and one way of choosing: so that it
    reaches the engine."""
    body = case.body
    if not isinstance(body, dict) or number < 0:
        return case
    for name in ("timeout", "frame", "window", *WAYS[:number], *WAYS[number + 1 :]):
        body.pop(name, None)
    case.headers.pop("X-Request-Timeout", None)
    image = IMAGES[number]
    if "image" in body:
        body["image"] = image if case.media_type == "multipart/form-data" else data_url(image)
    if "messages" in body:
        body["model"] = "tiny"
        parts = chat("tiny", "which organ", image)["messages"]
        body["messages"] = [*body["messages"], *parts] if number % 2 else parts
    return case


def operations(server):
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) >= 8
    return found


def asked(server, operation, mode, count, check):
    """Examples of an operation -> how often each status came."""
    statuses = {}

    @settings(max_examples=count, **NO_DEADLINE)
    @given(operation.as_strategy(generation_mode=mode), st.integers(-1, len(IMAGES) - 1))
    def examples(case, number):
        if mode is schemathesis.GenerationMode.POSITIVE:
            case = with_image(case, number)
        response = case.call(timeout=30)
        assert not LEAKS.search(response.content), response.content[:300]
        check(response)
        case.validate_response(response, checks=CHECKS + EXTRA[mode])
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    examples()
    return statuses


EXTRA = {
    schemathesis.GenerationMode.POSITIVE: [],
    schemathesis.GenerationMode.NEGATIVE: [checks.negative_data_rejection],
}


def no_fault(response):
    assert response.status_code < 500 or response.status_code == 504, (response.status_code, response.content[:300])
    if response.status_code >= 400:
        code = response.json()["error"]["code"]
        assert code in OURS or code.startswith("image_") or response.status_code == 404, code


def client_s(response):
    assert response.status_code < 500, (response.status_code, response.content[:300])


def both_ways(server, count):
    told = {}
    for operation in operations(server):
        name = f"{operation.method.upper()} {operation.path}"
        told[name] = {"valid": asked(server, operation, schemathesis.GenerationMode.POSITIVE, count, no_fault)}
        if operation.body or operation.headers:  # a name in a path may be any: nothing can be wrong
            told[name]["invalid"] = asked(server, operation, schemathesis.GenerationMode.NEGATIVE, count, client_s)
    print(json.dumps(told))
    wait(server.idle)
    server.law()
    assert told["POST /v1/vqa"]["valid"].get(200) and told["POST /v1/chat/completions"]["valid"].get(200)


def test_requests_out_of_the_document(server):
    both_ways(server, 20)


@pytest.mark.soak
def test_two_hundred_requests_an_operation(server):
    both_ways(server, 200)


@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/chat/completions"])
def test_ten_thousand_levels_of_json(server, path):
    for text in (b"[" * 10_000 + b"]" * 10_000, b'{"image":' * 10_000 + b"1" + b"}" * 10_000):
        response = server.client.post(path, content=text, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["code"] in ("bad_json", "bad_request")


def head(*lines):
    return (
        "\r\n".join(("POST /v1/vqa HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines)) + "\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (("Transfer-Encoding: chunked", "Content-Length: 2"), b"2\r\n{}\r\n0\r\n\r\n"),
        (("Transfer-Encoding: chunked",), b"-1\r\n{}\r\n0\r\n\r\n"),
        (("Transfer-Encoding: chunked",), b"ffffffffffffffffffff\r\n{}"),
        (("Transfer-Encoding: chunked",), b"2\r\n{}xx0\r\n\r\n"),
        (("Transfer-Encoding: chunked",), b"5\r\n{}\r\n0\r\n\r\n"),
        (("Transfer-Encoding: chunked",), b"2;a=" + b"b" * 70_000 + b"\r\n{}\r\n0\r\n\r\n"),
        (("Transfer-Encoding: gzip, chunked",), b"2\r\n{}\r\n0\r\n\r\n"),
        (("Content-Length: 2", "Content-Length: 3"), b"{}}"),
        (("Content-Length: +2",), b"{}"),
        (("Content-Length: 0x2",), b"{}"),
        (("Content-Length: 99999999999999999999999",), b"{}"),
        (("X-Long: " + "a" * 65_600,), b""),
        (tuple(f"X-{n}: {'a' * 60}" for n in range(1100)), b""),
        (("X-Nul: a\0b",), b""),
        (("X Y: a",), b""),
    ],
)
def test_lies_of_length_and_long_headers_are_refused(server, lines, body):
    connection = server.raw(head(*lines).encode() + body, 12)
    answer = read_all(connection) if b"\0" in body else read_first(connection)
    assert not answer or 400 <= int(answer[9:12]) < 500 or int(answer[9:12]) == 501, answer[:300]
    assert not LEAKS.search(answer)
    connection.close()
    assert server.client.get("/health").status_code == 200
    wait(server.idle)
    server.law()


def read_first(connection):
    """What comes first; nothing where the client would have to go on, which another deadline ends."""
    connection.settimeout(2)
    try:
        return connection.recv(65_536)
    except (TimeoutError, ConnectionError):
        return b""
