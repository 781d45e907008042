"""`miss serve` as users start it: a process of its own, with the checkpoint that ships."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from miss.engine.runtime.loading import CHECKPOINTS
from tests.engine.serving.broken import dicom, picture
from tests.engine.serving.harness import LEAKS, chat, data_url, png, read_all, wait
from tests.engine.serving.started import ROOT, Process

SMALL = CHECKPOINTS / "miss-small"
XRAY = ROOT / "examples" / "chest-xray.jpg"
KEY = "a-key-of-these-tests"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    if not (SMALL / "model.safetensors").exists():
        pytest.skip(f"{SMALL} is not there")
    folder = tmp_path_factory.mktemp("served")
    process = Process(folder, SMALL, "--audit-log", str(folder / "audit"), key=KEY)
    yield process
    if process.process.poll() is None:
        assert process.terminate() == 0


def test_the_official_client_asks_the_shipped_model(served):
    client = openai.OpenAI(base_url=served.url + "/v1", api_key=KEY, max_retries=0)
    parts = [
        {"type": "text", "text": "which organ is shown?"},
        {"type": "image_url", "image_url": {"url": data_url(XRAY.read_bytes(), "image/jpeg")}},
    ]
    messages = [{"role": "user", "content": parts}]
    model = client.models.list().data[0].id
    found = client.chat.completions.create(model=model, messages=messages, logprobs=True)
    assert found.choices[0].message.content == "lung" and found.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=model, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "lung"
    assert chunks[-1].usage == found.usage
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url + "/v1", api_key="wrong", max_retries=0).models.list()


def test_a_killed_engine_is_replaced_within_ten_seconds(served):
    first = served.engine.pid
    os.kill(first, signal.SIGKILL)
    start = time.monotonic()
    wait(lambda: served.client.get("/ready").status_code == 503, 5)
    refused = served.client.post("/v1/vqa", json={"image": data_url(png()), "question": "ct"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_ready"
    assert served.client.get("/health").status_code == 200
    wait(lambda: served.client.get("/ready").status_code == 200, 30)
    assert time.monotonic() - start < 20 and served.engine.pid != first  # 10 in test_faults.py's soak


def exif_with(text):
    from PIL import Image

    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = text
    return picture(kind="JPEG", exif=exif)


def test_canaries_are_in_no_log_metric_file_or_error(served):
    """Zz: in questions, file names, tags, headers, paths, keys and parameters; ends with the process' own end."""
    canary, bodies, spooled = "Zz-canary-7141", [], []
    images = [dicom(canary), exif_with(canary), canary.encode(), dicom(canary)[:300], png(1) + bytes(3 << 20)]
    headers = {"x-request-id": f"{canary} x", "user-agent": canary, "x-canary": canary, "referer": f"http://{canary}/"}
    stop = threading.Event()

    def look():
        while not stop.is_set():
            spooled.extend(served.tmp.iterdir())
            time.sleep(0.002)

    looker = threading.Thread(target=look)
    looker.start()
    for image in images:
        files = {"image": (f"{canary}.png", image)}
        response = served.client.post("/v1/vqa", files=files, data={"question": f"is {canary} there"}, headers=headers)
        assert response.status_code in (200, 422)
        bodies.append(response.text)
    for body in ({canary: 1}, {"model": canary}, chat("miss-small", canary, b"x"), chat(canary, canary, images[1])):
        bodies.append(served.client.post("/v1/chat/completions", json=body, headers=headers).text)
    bodies.append(served.client.get(f"/{canary}?q={canary}", headers=headers).text)
    bodies.append(served.client.request("POST", "/v1/vqa", headers={"authorization": f"Bearer {canary}"}).text)
    metrics = served.client.get("/metrics").text
    stop.set()
    looker.join()
    assert served.terminate() == 0
    texts = {"bodies": "\n".join(bodies), "metrics": metrics, "out": served.out.read_text()}
    texts |= {"err": served.err.read_text(), "audit": (served.err.parent / "audit").read_text()}
    for name, text in texts.items():
        assert "canary" not in text.lower() and "zz" not in text.lower().split(), name
        assert KEY not in text, name
    assert not LEAKS.search(texts["bodies"].encode())
    assert not spooled and not list(served.tmp.iterdir()), "uploads were written to a disk"
    lines = [json.loads(line) for line in texts["err"].splitlines()]
    assert {"listening", "ready", "request", "stopped", "engine_ended"} <= {line["event"] for line in lines}


def terminated_under_load(process, threads=8):
    """SIGTERM while many ask: none that was taken on is left without an answer, and nothing stays behind."""
    results, lock, stop = [], threading.Lock(), threading.Event()
    body = {"image": data_url(png(1)), "questions": ["ct", "which organ", "is there a mass?", "left lung?"]}

    def ask():
        with httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while not stop.is_set():
                start, told = time.monotonic(), None
                with contextlib.suppress(httpx.HTTPError):
                    told = client.post(process.url + "/v1/vqa", json=body).status_code
                with lock:
                    results.append((start, told))

    askers = [threading.Thread(target=ask) for _ in range(threads)]
    for asker in askers:
        asker.start()
    time.sleep(0.7)
    at = time.monotonic()
    code = process.terminate()
    stop.set()
    for asker in askers:
        asker.join(30)
    assert code == 0, process.err.read_text()[-2000:]
    before = [told for start, told in results if start < at - 0.1]
    assert before and set(before) == {200}, before
    assert {told for _, told in results} <= {200, 503, None}
    lines = [json.loads(line) for line in process.err.read_text().splitlines()]
    outcomes = [line["outcome"] for line in lines if line["event"] == "request"]
    assert set(outcomes) <= {"answered", "rejected"}, "one that was taken on had no answer"


def terminated(folder, path, count):
    for number in range(count):
        (path / str(number)).mkdir()
        terminated_under_load(Process(path / str(number), folder))


def test_five_sigterms_under_load_leave_nobody_unanswered(folder, tmp_path):
    terminated(folder, tmp_path, 5)


def test_a_stop_says_nothing_of_errors_and_tells_who_was_cut_off(folder, tmp_path):
    """With a connection that is kept, one with half its headers, and one whose body does not come in time."""
    process = Process(tmp_path, folder, "--drain-timeout", "1")
    address = ("127.0.0.1", int(process.url.rpartition(":")[2]))
    connections = [socket.create_connection(address, timeout=10) for _ in range(3)]
    connections[1].sendall(b"GET /health HTTP/1.1\r\nHost: local")
    head = b"POST /v1/vqa HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    connections[2].sendall(head + b"{")
    process.client.get("/health")
    assert process.terminate() == 0
    answer = read_all(connections[2])
    assert answer.startswith(b"HTTP/1.1 503") and b'"draining"' in answer
    lines = [json.loads(line) for line in process.err.read_text().splitlines()]
    assert {line["level"] for line in lines} == {"info"}, [line for line in lines if line["level"] != "info"]
    assert [line["requests"] for line in lines if line["event"] == "cut_off"] == [1]


@pytest.mark.soak
@pytest.mark.parametrize("part", range(5))
def test_fifty_sigterms_under_load(folder, tmp_path, part):
    terminated(folder, tmp_path, 10)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--checkpoint", "nowhere"], "no checkpoint"),
        (["--host", "0.0.0.0"], "without a key"),
        (["--api-key", "short"], "at least 8"),
        (["--timeout", "-1"], "above 0"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(flags, says, tmp_path):
    command = [sys.executable, "-P", "-m", "miss", "serve", "--port", "0", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 1 and says in done.stderr.splitlines()[-1], done.stderr
