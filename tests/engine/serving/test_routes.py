"""What each route answers, held against the engine itself, and each refusal's status and word."""

import json
import time

import numpy as np
import openai
import pytest

from miss import Engine, SamplingParams
from miss.engine.serving import frames
from miss.engine.serving.auth import PUBLIC
from miss.engine.serving.images import BURNED_IN
from tests.engine.serving.broken import burned_in
from tests.engine.serving.harness import LEAKS, chat, checked, data_url, png

QUESTIONS = ("is there a mass?", "which organ", "ct", "left lung?")


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder)


def stream(client, body):
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_many_questions_for_one_image_are_answered_as_by_the_engine(server, engine):
    image = png(1)
    response = server.vqa(image, *QUESTIONS)
    assert response.status_code == 200 and response.headers["x-intended-use"] == "research-only"
    found = response.json()
    for question, answer in zip(QUESTIONS, found["answers"], strict=True):
        truth = engine.answer(image, question)
        assert answer["answer"] == truth.text and answer["score"] == pytest.approx(truth.score, rel=1e-4)
        assert [a["answer"] for a in answer["alternatives"]] == [a.text for a in truth.alternatives]
    assert found["id"] == response.headers["x-request-id"] and found["model"] == "tiny"
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]


def test_an_image_is_sent_to_the_engine_once_and_again_where_it_was_let_go(server, engine, monkeypatch):
    asked, write = [], frames.write

    def noted(writer, message, data=b""):
        if message["op"] == "ask":
            asked.append((len(message["items"]), len(data)))
        write(writer, message, data)

    monkeypatch.setattr(frames, "write", noted)
    answers = [server.vqa(png(71), *QUESTIONS).json()["answers"] for _ in range(2)]
    size = 3 * engine.processor.preprocess.image_size**2
    assert asked == [(4, size), (4, 0)]
    assert [a["answer"] for a in answers[0]] == [a["answer"] for a in answers[1]]
    monkeypatch.setattr(server.service.supervisor, "_note", lambda name: True)  # what the engine has no more
    found = server.vqa(png(72), *QUESTIONS).json()["answers"]
    assert asked[2:] == [(4, 0), (4, size)]
    assert [a["answer"] for a in found] == [engine.answer(png(72), q).text for q in QUESTIONS]


def test_a_form_is_answered_as_json_is(server):
    image = png(2)
    files, data = {"image": ("scan.png", image, "image/png")}, {"question": list(QUESTIONS[:2]), "alternatives": "1"}
    form = server.client.post("/v1/vqa", files=files, data=data).json()
    told = server.vqa(image, *QUESTIONS[:2], alternatives=1).json()
    for one, other in zip(form["answers"], told["answers"], strict=True):
        assert one["answer"] == other["answer"] and len(one["alternatives"]) == len(other["alternatives"]) == 1


@pytest.mark.parametrize("way", ["candidates", "constrain"])
def test_answers_out_of_a_list(server, engine, way):
    image, answers = png(3), ["lung", "liver", "no mass"]
    found = server.vqa(image, "which organ", **{way: answers}).json()["answers"][0]
    truth = engine.answer(image, "which organ", SamplingParams(**{way: tuple(answers)}))
    assert found["answer"] == truth.text in answers and found["score"] == pytest.approx(truth.score, rel=1e-4)


def test_a_long_question_is_answered_with_a_warning(server):
    answer = server.vqa(png(3), "lung " * 40).json()["answers"][0]
    assert "only the first" in answer["warnings"][0]


def test_attention_is_told_where_it_is_wanted(server):
    image = png(3)
    (answer,) = server.vqa(image, "which organ", attention_map=True).json()["answers"]
    seen = np.array(answer["attention"]["maps"])
    assert seen.shape[1:] == (2, 2) and len(seen) == len(answer["attention"]["tokens"])
    assert seen.sum((1, 2)) + np.array(answer["attention"]["elsewhere"]) == pytest.approx(1, abs=1e-4)
    data = {"question": "which organ", "attention_map": "true"}
    form = server.client.post("/v1/vqa", files={"image": image}, data=data).json()["answers"][0]
    assert form["attention"] == answer["attention"]
    assert server.vqa(image, "which organ").json()["answers"][0]["attention"] is None


def test_chat_answers_as_the_engine(server, engine):
    image = png(4)
    found = server.chat("which organ", image, logprobs=True, n=2).json()
    truth = engine.answer(image, "which organ", SamplingParams(num_alternatives=1))
    assert [c["message"]["content"] for c in found["choices"]] == [truth.text, truth.alternatives[0].text]
    told = found["choices"][0]["logprobs"]["content"]
    assert sum(token["logprob"] for token in told) == pytest.approx(truth.logprob, abs=1e-3)
    assert len(told) == len(truth.token_ids)
    made = len(truth.token_ids) + len(truth.alternatives[0].token_ids)
    assert found["usage"]["completion_tokens"] == made


def test_the_likeliest_tokens_at_each_place_are_told(server, engine):
    """The first is the chosen one; all are those of the full distribution, by a search that feeds the same tokens."""
    image = png(4)
    plain = server.chat("which organ", image, logprobs=True, n=3, num_beams=1).json()
    found = server.chat("which organ", image, logprobs=True, n=3, num_beams=1, top_logprobs=20).json()
    for one, other in zip(found["choices"], plain["choices"], strict=True):
        assert one["message"] == other["message"]
        for token, same in zip(one["logprobs"]["content"], other["logprobs"]["content"], strict=True):
            top = [(entry["token"], entry["logprob"]) for entry in token["top_logprobs"]]
            assert len(top) == 20 and len({text for text, _ in top}) == 20 and same["top_logprobs"] == []
            assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
            assert token["logprob"] == pytest.approx(same["logprob"], abs=1e-5)
            assert (token["token"], pytest.approx(token["logprob"], abs=1e-6)) in top
    first = found["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"][0]["token"] == token["token"] for token in first)
    alone = engine.answer(image, "which organ", SamplingParams(num_beams=1, num_alternatives=0, top_logprobs=3))
    assert [len(top) for top in alone.top_logprobs] == [3] * len(alone.token_ids)
    assert [top[0][0] for top in alone.top_logprobs] == alone.token_ids
    every = engine.answer(image, "which organ", SamplingParams(num_beams=1, num_alternatives=0, top_logprobs=10**6))
    for top in every.top_logprobs:
        assert sum(np.exp(logprob) for _, logprob in top) == pytest.approx(1, abs=1e-5)


def test_what_a_file_says_of_text_in_its_pixels_is_in_the_answer(server):
    for told, warnings in ((None, []), ("YES", [BURNED_IN])):
        data = burned_in(told)
        assert server.vqa(data, "ct").json()["answers"][0]["warnings"] == warnings
        assert server.chat("ct", data).json()["miss"]["warnings"] == warnings


def test_a_stream_is_the_whole_answer_in_parts(server):
    for seed in range(6):
        body = chat("tiny", QUESTIONS[seed % 4], png(seed), stream_options={"include_usage": True}, n=1 + seed % 2)
        *chunks, last = stream(server.client, body)
        whole = server.client.post("/v1/chat/completions", json={k: body[k] for k in body if k != "stream_options"})
        for choice in whole.json()["choices"]:
            deltas = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            assert "".join(d["delta"].get("content", "") for d in deltas) == choice["message"]["content"]
            assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == [choice["finish_reason"]]
        assert last["usage"] == whole.json()["usage"] and last["choices"] == []


def test_a_seed_repeats_its_draws(server):
    draw = {"temperature": 1.5, "n": 3, "seed": 7}
    one, other = (server.chat("which organ", png(5), **draw).json()["choices"] for _ in range(2))
    assert one == other and len(one) == 3


def test_the_official_client_works_unchanged(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    messages = chat("tiny", "is there a mass?", png(6))["messages"]
    found = client.chat.completions.create(model="tiny", messages=messages, logprobs=True, max_tokens=200)
    assert found.choices[0].finish_reason in ("stop", "length") and found.usage.completion_tokens > 0
    assert found.choices[0].logprobs.content[0].logprob <= 0
    parts = client.chat.completions.create(model="tiny", messages=messages, stream=True, max_tokens=200)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == found.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=messages)
    with pytest.raises(openai.UnprocessableEntityError):
        broken = chat("tiny", "is there a mass?", b"GIF89a....")["messages"]
        client.chat.completions.create(model="tiny", messages=broken)


def spoilt(**changes):
    return {**chat("tiny", "ct", png(7)), **changes}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


IMAGE = {"type": "image_url", "image_url": {"url": data_url(png(7))}}
BROKEN = {"type": "image_url", "image_url": {"url": "data:;base64,@@"}}
REMOTE = {"type": "image_url", "image_url": {"url": "https://example.org/scan.png"}}
TEXT = {"type": "text", "text": "ct"}
REFUSALS = [
    (b"", 400, "bad_json"),
    (b"{", 400, "bad_json"),
    (b"[" * 10_000, 400, "bad_json"),
    (b'{"model":' * 10_000, 400, "bad_json"),
    (b"[]", 400, "bad_request"),
    (b"\xff\xfe{}", 400, "bad_json"),
    (spoilt(temperature="hot"), 400, "bad_request"),
    (spoilt(temperature=-1), 400, "bad_request"),
    (spoilt(n=1000), 400, "bad_request"),
    (spoilt(canary_key=1), 400, "bad_request"),
    (spoilt(tools=[{}]), 400, "bad_request"),
    (spoilt(top_logprobs=5), 400, "bad_request"),
    (spoilt(top_logprobs=21, logprobs=True), 400, "bad_request"),
    (spoilt(top_logprobs=5, logprobs=True, num_beams=2), 400, "unsupported"),
    (spoilt(top_logprobs=5, logprobs=True, candidates=["lung"]), 400, "unsupported"),
    (spoilt(messages=[]), 400, "bad_request"),
    (spoilt(candidates=["a"], constrain=["b"]), 400, "conflicting"),
    (spoilt(candidates=["lung"] * 1025), 400, "bad_request"),
    (spoilt(candidates=["  "]), 400, "bad_request"),
    (spoilt(num_beams=2, n=3), 400, "bad_request"),
    (spoilt(model="gpt-9"), 404, "model_not_found"),
    (spoilt(messages=[{"role": "system", "content": "ct"}]), 400, "question_required"),
    (spoilt(messages=user(TEXT)), 400, "image_required"),
    (spoilt(messages=user(IMAGE)), 400, "question_required"),
    (spoilt(messages=user(TEXT, IMAGE, IMAGE)), 400, "too_many_images"),
    (spoilt(messages=user(TEXT, REMOTE)), 422, "image_url_refused"),
    (spoilt(messages=user({"type": "text", "text": "\u200b"}, IMAGE)), 400, "bad_question"),
    (spoilt(messages=user(TEXT, BROKEN)), 422, "image_not_base64"),
    (spoilt(frame=7), 422, "image_no_such_frame"),
    (spoilt(window=[0.0, -1.0]), 422, "image_bad_option"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code"), REFUSALS, ids=[f"{c}-{i}" for i, (_, _, c) in enumerate(REFUSALS)])
def test_refusals_of_chat(server, body, status, code):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    checked(response, status, code)
    assert "canary" not in response.text and "gpt-9" not in response.text and "example" not in response.text
    server.law()


def test_refusals_of_vqa(server):
    post, image = server.client.post, png(7)
    checked(post("/v1/vqa", json={"image": data_url(image)}), 400, "bad_request")
    checked(post("/v1/vqa", json={"image": data_url(image), "question": "a", "questions": ["b"]}), 400, "bad_request")
    checked(post("/v1/vqa", json={"image": "http://x/y.png", "question": "ct"}), 422, "image_url_refused")
    checked(post("/v1/vqa", content=b"x", headers={"content-type": "text/plain"}), 415, "unsupported_media_type")
    checked(post("/v1/vqa", data={"question": "ct"}, files={"other": b"x"}), 400, "image_required")
    checked(post("/v1/vqa", files={"image": image}), 400, "bad_request")
    checked(post("/v1/vqa", data={"question": "ct", "canary": "1"}, files={"image": image}), 400, "bad_request")
    two = [("image", ("a", image)), ("image", ("b", image))]
    checked(post("/v1/vqa", data={"question": "ct"}, files=two), 400, "bad_form")
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for broken in (b"", b"--x", b"--x\r\n\r\n", b'--x\r\nContent-Disposition: form-data; name="question"\r\n\r\nct'):
        checked(post("/v1/vqa", content=broken, headers=kind), 400)
    checked(post("/v1/vqa", content=b"", headers={"content-type": "multipart/form-data"}), 400, "bad_form")
    checked(server.vqa(image, *["ct"] * 65), 400, "bad_request")
    server.law()


def test_other_paths_and_methods(server):
    checked(server.client.get("/nope"), 404, "not_found")
    checked(server.client.get("/v1/vqa"), 405, "method_not_allowed")
    checked(server.client.get("/v1/models/gpt-9"), 404, "model_not_found")
    assert server.client.get("/version").json() == {"version": "test"}
    assert server.client.get("/docs").status_code == 200
    document = server.client.get("/openapi.json").json()
    assert {"ChatRequest", "VqaRequest", "VqaForm", "ErrorResponse"} <= set(document["components"]["schemas"])


def test_a_kept_connection_does_not_wait_for_acknowledgements(server):
    """Nagle's algorithm and delayed acknowledgements together cost 40 ms a response."""
    took = []
    for _ in range(15):
        start = time.perf_counter()
        assert server.client.get("/health").status_code == 200
        took.append(time.perf_counter() - start)
    assert min(took) < 0.03, took


def test_request_ids_are_kept_where_they_are_plain(server):
    given = server.client.get("/health", headers={"x-request-id": "abc-1.2_3"})
    assert given.headers["x-request-id"] == "abc-1.2_3"
    made = server.client.get("/health", headers={"x-request-id": "canary canary"})
    assert len(made.headers["x-request-id"]) == 32


def test_every_route_wants_the_token(tight):
    """By enumeration of the application's own routes."""
    import httpx

    seen = 0
    for route in tight.server.app.routes:
        for method in route.methods:
            path = route.path.replace("{name}", "tiny")
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-of-tests"}):
                response = httpx.request(method, tight.url + path, headers=headers)
                if path in PUBLIC:
                    assert response.status_code in (200, 405), path
                else:
                    checked(response, 401)
                    assert response.headers["www-authenticate"] == "Bearer"
                seen += 1
    assert seen > 20
    assert tight.client.get("/v1/models").status_code == 200


def test_a_wrong_key_is_said_even_to_who_sends_much(tight):
    import httpx

    for _ in range(20):
        checked(httpx.post(tight.url + "/v1/vqa", content=bytes(3_000_000)), 401, "unauthorized")
    tight.law()


def test_without_a_key_no_page_of_elsewhere_may_ask(server):
    checked(server.client.get("/v1/models", headers={"host": "evil.example"}), 400, "bad_host")
    checked(server.client.get("/v1/models", headers={"origin": "http://evil.example"}), 403, "bad_origin")
    assert server.client.get("/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200


def test_metrics_are_the_truth(server):
    before = server.law()
    server.vqa(png(8), "ct", "which organ")
    server.chat("ct", png(8))
    server.chat("ct", b"no image")
    after = server.law()

    def risen(name):
        return after.get(name, 0) - before.get(name, 0)

    assert risen("miss:requests_received_total") == 3
    assert risen('miss:requests_ended_total{outcome="answered"}') == 2
    assert risen('miss:requests_rejected_total{reason="image_not_an_image"}') == 1
    assert risen('miss:image_rejected_total{reason="image_not_an_image"}') == 1
    done = [k for k in after if k.startswith("miss:request_success_total")]
    assert sum(risen(k) for k in done) == 3
    assert risen('miss:e2e_request_latency_seconds_count{model_name="tiny"}') == 2
    assert risen('miss:http_requests_total{handler="/v1/vqa",method="POST",status="200"}') == 1


def test_the_audit_log_says_who_and_what_but_no_content(server):
    server.client.post("/v1/vqa", json={"image": data_url(png(9)), "question": "is there a mass canary?"})
    path = server.settings.audit_log
    from tests.engine.serving.harness import wait

    wait(lambda: path.read_text().count("\n") > 0 and "answered" in path.read_text().splitlines()[-1])
    line = json.loads(path.read_text().splitlines()[-1])
    assert line["outcome"] == "answered" and line["principal"] == "loopback" and len(line["weights"]) == 64
    assert len(line["image"]) == 64 and len(line["scores"]) == 1
    assert "canary" not in path.read_text() and not LEAKS.search(path.read_bytes())
    assert path.stat().st_mode & 0o777 == 0o600
