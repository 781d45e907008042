"""The endpoint writer against a real HTTP server of this file's own, which fails in every way that servers do."""

import email.utils
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("httpx", reason="httpx is not installed: pip install 'miss-engine[transcap]'")

from miss.cli import run as miss
from miss.engine.transcap.endpoint import Endpoint, EndpointError, EndpointWriter, retry_after
from miss.engine.transcap.labels import Labels, LabelSet
from miss.engine.transcap.prompts import get_prompt
from miss.engine.transcap.run import TransCapConfig, run

KEY = "sk-very-secret"
SETS = [LabelSet((("modality", "CT"), ("organ", organ)), [f"{organ}.png"]) for organ in ("chest", "head", "hand")]


class Server(ThreadingHTTPServer):
    """Answers well, but first, one a request, in the ways of `faults`; remembers every request and when it came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.times, self.keys, self.most = [], [], [], [], 99
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that hangs up is what some tests want."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, body))
            server.times.append(time.monotonic())
            server.keys.append(self.headers.get("Authorization"))
            fault = server.faults.pop(0) if server.faults else None
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            (fault or good)(self, body)
        finally:
            with server.lock:
                server.at_once -= 1

    def log_message(self, *_):
        pass


def send(handler, status, content, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def good(handler, body):
    organ = body["messages"][-1]["content"].rstrip(".").split()[-1]
    texts = [
        f"A CT of the {organ}.",
        f"CT scan showing the {organ}.",
        f"The {organ} is visible on this CT image.",
        f"{organ} with a tumour",
    ]
    choices = [
        {"message": {"content": t}, "finish_reason": "stop"} for t in texts[: min(body["n"], handler.server.most)]
    ]
    usage = {"prompt_tokens": 100, "completion_tokens": 10 * len(choices)}
    send(handler, 200, json.dumps({"model": "served-1", "choices": choices, "usage": usage}).encode())


def status(code, **headers):
    return lambda handler, body: send(handler, code, f'{{"error": "said of {KEY}"}}'.encode(), **headers)


def says(content):
    return lambda handler, body: send(handler, 200, content)


def slow(handler, body):
    time.sleep(0.6)
    good(handler, body)


def drips(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def cut(handler, body):
    """Half an answer, then nothing more will come."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def reset(handler, body):
    """The connection is reset before a byte is answered."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.close(handler.connection.detach())


def huge(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(2**30))
    handler.end_headers()
    for _ in range(1024):
        handler.wfile.write(b" " * 2**20)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def writer(server, prompt="labels", **options):
    options = {"timeout": 5.0, "retries": 3, "rate": 1e6, "parallel": 1, "backoff": 0.01, **options}
    return EndpointWriter(Endpoint(server.url, "m", **options), get_prompt(prompt))


def test_what_is_asked_and_what_comes_back(server):
    (written, second, _) = writer(server).write(SETS, 3, seed=7)
    path, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["n"] == 3
    assert body["messages"][0]["role"] == "system" and body["messages"][-1]["content"] == "modality: CT; organ: chest"
    assert body["seed"] != server.requests[1][1]["seed"]
    assert written.tokens == {"read": 100, "written": 30, "requests": 1} and written.model == "served-1"
    assert [c.text for c in written.candidates][0] == "A CT of the chest." and len(second.candidates) == 3


def test_fewer_choices_than_asked_for_are_asked_for_again(server):
    server.most = 1
    (written,) = writer(server, "rewrite").write(SETS[:1], 3, seed=7)
    assert [body["n"] for _, body in server.requests] == [3, 2, 1] and len(written.candidates) == 3
    assert len({body["seed"] for _, body in server.requests}) == 3 and written.tokens["requests"] == 3
    assert server.requests[0][1]["messages"][-1]["content"] == "CT of the chest."


def test_a_server_that_does_not_sample_is_not_asked_for_ever(server):
    """One choice a request, whatever `n`, and the same for every seed: transformers serve without do_sample."""
    server.most = 1
    (written,) = writer(server).write(SETS[:1], 16, seed=7)
    assert len(server.requests) == 4 and {c.text for c in written.candidates} == {"A CT of the chest."}


@pytest.mark.parametrize(
    "fault",
    [
        status(500),
        status(503),
        status(429),
        status(408),
        says(b"<html>not JSON"),
        says(b"[]"),
        says(b'{"choices": []}'),
        says(b'{"choices": [{"message": {"content": null}}]}'),
        says(b"\xff\xfe\x00"),
        cut,
        reset,
    ],
    ids=["500", "503", "429", "408", "html", "list", "no-choice", "no-text", "bytes", "cut", "reset"],
)
def test_what_may_pass_is_tried_again(server, fault):
    server.faults = [fault, fault]
    (written,) = writer(server).write(SETS[:1], 2, seed=1)
    assert len(written.candidates) == 2 and len(server.requests) == 3
    assert server.requests[0] == server.requests[2], "the same request again, its seed included"


@pytest.mark.parametrize("fault", [slow, drips], ids=["silent", "dripping"])
def test_a_slow_answer_is_given_up_and_asked_for_again(server, fault):
    server.faults = [fault]
    start = time.monotonic()
    (written,) = writer(server, timeout=0.3).write(SETS[:1], 2, seed=1)
    assert len(written.candidates) == 2 and 0.25 < time.monotonic() - start < 2.0


def test_retry_after_is_honoured(server):
    server.faults = [status(429, Retry_After="0.4"), status(503, Retry_After="0.2")]
    writer(server).write(SETS[:1], 1, seed=1)
    first, second, third = server.times
    assert 0.4 <= second - first < 1.5 and 0.2 <= third - second < 1.2


def test_a_wait_that_is_too_long_is_said(server):
    server.faults = [status(429, Retry_After="86400")]
    with pytest.raises(EndpointError, match="86400 s.*the same command again"):
        writer(server).write(SETS[:1], 1, seed=1)
    assert len(server.requests) == 1


def test_waits_grow(server):
    server.faults = [status(500)] * 3
    writer(server, backoff=0.1).write(SETS[:1], 1, seed=1)
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert 0.05 <= gaps[0] and 0.1 <= gaps[1] and 0.2 <= gaps[2]


@pytest.mark.parametrize(
    ("code", "says"), [(400, "refuses"), (401, "--key-variable"), (403, "key"), (404, "--url"), (302, "compatible")]
)
def test_what_cannot_pass_is_an_error_at_once_and_never_shows_the_key(server, monkeypatch, code, says):
    monkeypatch.setenv("MISS_TRANSCAP_KEY", KEY)
    server.faults = [status(code, Location="http://127.0.0.1:1/")]
    with pytest.raises(EndpointError, match=f"answered {code}.*{says}") as error:
        writer(server).write(SETS[:1], 1, seed=1)
    assert len(server.requests) == 1 and KEY not in str(error.value) and server.keys == [f"Bearer {KEY}"]


def test_giving_up_says_why_and_what_to_do(server):
    server.faults = [status(502)] * 9
    with pytest.raises(EndpointError, match="answered 502, 4 times.*the same command again"):
        writer(server).write(SETS[:1], 1, seed=1)
    closed = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    closed.close()
    with pytest.raises(EndpointError, match=r"the connection failed \(ConnectError\), 1 times"):
        EndpointWriter(Endpoint(url, "m", retries=0, rate=1e6), get_prompt("labels")).write(SETS[:1], 1, 1)


def test_an_endless_answer_is_refused(server):
    server.faults = [huge]
    with pytest.raises(EndpointError, match="more than 8,388,608 bytes"):
        writer(server).write(SETS[:1], 1, seed=1)


def test_requests_run_side_by_side_and_within_the_rate(server):
    server.faults = [slow] * 3
    start = time.monotonic()
    writer(server, parallel=3).write(SETS, 1, seed=1)
    assert server.most_at_once == 3 and time.monotonic() - start < 1.5
    server.times.clear()
    writer(server, parallel=3, rate=600).write(SETS, 1, seed=1)
    assert server.times[-1] - server.times[0] > 0.18


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("", {}, "wanted where the API starts"),
        ("ftp://x/v1", {}, "wanted where the API starts"),
        ("http://user:pw@127.0.0.1/v1", {}, "name, password or query"),
        ("https://models.example/v1?api-key=1", {}, "name, password or query"),
        ("http://models.example/v1", {}, "in the clear"),
        ("http://[::1/v1", {}, "--url"),
        ("http://127.0.0.1/v1", {"model": ""}, "--model"),
        ("http://127.0.0.1/v1", {"rate": 0.0}, "--rate"),
        ("http://127.0.0.1/v1", {"timeout": -1.0}, "--timeout"),
    ],
)
def test_wrong_settings(monkeypatch, url, options, says):
    monkeypatch.setenv("MISS_TRANSCAP_KEY", KEY)
    with pytest.raises(EndpointError, match=says) as error:
        Endpoint(url, **{"model": "m", **options})
    assert KEY not in str(error.value)


def test_dates_and_seconds_of_retry_after():
    assert retry_after("7") == 7.0 and retry_after("-1") == 0.0 and retry_after(None) is None
    assert retry_after(email.utils.formatdate(1000.0, usegmt=True), now=lambda: 990.0) == pytest.approx(10.0)
    assert retry_after("soon") is None


def test_a_run_that_the_server_broke_goes_on_and_equals_the_undisturbed_one(server, tmp_path):
    labels, config = Labels(SETS, {}), TransCapConfig(batch=1, candidates=4)
    run(labels, writer(server), tmp_path / "whole", config)
    server.requests.clear()
    server.faults = [good, *[status(500)] * 4]
    with pytest.raises(EndpointError):
        run(labels, writer(server), tmp_path / "cut", config)
    server.requests.clear()
    report = run(labels, writer(server), tmp_path / "cut", config)
    assert len(server.requests) == 2, "what was written is not asked for again"
    for name in ("captions.jsonl", "captions.csv", "sets.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert report["tokens"] == {"read": 300, "written": 120, "requests": 3}
    assert report["rejected_by_rule"]["finding"] == 3


def test_the_command_by_itself(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    labels, out = tmp_path / "labels.jsonl", tmp_path / "out"
    labels.write_text("".join(json.dumps({"image": s.images[0], "labels": dict(s.facts)}) + "\n" for s in SETS))
    flags = ["--url", server.url, "--model", "m", "--key-variable", "A_KEY", "--rate", "6000", "--prompt", "labels"]
    assert miss(["transcap", "--labels", str(labels), "--out", str(out), "--writer", "endpoint", *flags]) == 0
    assert "tokens: 1,200 read" in capsys.readouterr().out and server.keys[0] == f"Bearer {KEY}"
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert rows[0]["provenance"]["answered_as"] == "served-1" and len(rows[0]["captions"]) == 5
    assert [s.get("filled", False) for s in rows[0]["sources"]].count(True) == 2
    assert all(KEY not in path.read_text() for path in out.iterdir())
