"""`miss serve --ray` with two replicas on this machine: the same answers, one replica an image, faults, a clean end."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from miss import Engine
from tests.engine.serving.harness import chat, checked, data_url, png, wait
from tests.engine.serving.test_process import ROOT, Process

pytestmark = [
    pytest.mark.soak,  # Ray's own processes take 15 s to start on two cores
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray Serve is not installed (the extra `ray`)"),
]
QUESTIONS = ("is there a mass?", "which organ", "ct", "left lung?")
CANARY = "Zz-canary-7141"


class Replicated(Process):
    """With what Ray started for it."""

    @property
    def replicas(self):
        return [child for child in self.family if child.cmdline()[:1] and "ServeReplica" in child.cmdline()[0]]

    def vqa(self, image, *questions):
        return self.client.post("/v1/vqa", json={"image": data_url(image), "questions": list(questions)})

    def metrics(self):
        lines = [line for line in self.client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def idle(self):
        found = self.metrics()
        gauges = [value for name, value in found.items() if name.startswith(("miss:num_requests", "miss:answer_slots"))]
        ended = sum(value for name, value in found.items() if name.startswith("miss:requests_ended_total"))
        return (
            not any(gauges) and not found["miss:requests_in_flight"] and ended == found["miss:requests_received_total"]
        )


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    process = Replicated(tmp_path_factory.mktemp("ray"), folder, "--ray", "--replicas", "2", "--threads", "1")
    yield process
    if process.process.poll() is None:
        assert process.terminate() == 0


def test_answers_are_those_of_the_engine_and_an_image_is_encoded_once(served, folder):
    engine = Engine.load(folder)
    before = served.metrics()
    for seed in range(12):
        for question in QUESTIONS:
            (answer,) = served.vqa(png(seed), question).json()["answers"]
            truth = engine.answer(png(seed), question)
            assert answer["answer"] == truth.text and answer["score"] == pytest.approx(truth.score, rel=1e-4)
    after = served.metrics()
    hits, queries = (f'miss:mm_cache_{name}_total{{model_name="tiny"}}' for name in ("hits", "queries"))
    assert after[queries] - before[queries] == 48 and after[hits] - before[hits] == 36
    for replica in served.replicas:  # both have worked: a blank image is what each began with
        assert psutil.Process(replica.pid).children()
    body = chat("tiny", "which organ", png(1))
    whole = served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    with served.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        text = response.read().decode()
    assert whole.split()[0] in text and text.rstrip().endswith("[DONE]")
    checked(served.vqa(b"no image", "ct"), 422, "image_not_an_image")


def test_nothing_listens_but_on_loopback(served):
    for process in [psutil.Process(served.process.pid), *served.family]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip.removeprefix("::ffff:") == "127.0.0.1", (process.name(), connection)


def under_load(served, harm):
    """Asks about many images while `harm` is done; all responses."""
    results, lock, stop = [], threading.Lock(), threading.Event()

    def ask(number):
        with httpx.Client(base_url=served.url, timeout=30) as client:
            seed = number
            while not stop.is_set():
                body = {"image": data_url(png(seed % 24)), "questions": list(QUESTIONS)}
                response = client.post("/v1/vqa", json=body)
                with lock:
                    results.append((time.monotonic(), response))
                seed += 1

    threads = [threading.Thread(target=ask, args=(6 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    harm()
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a request hangs"
    return results


@pytest.mark.parametrize("what", ["replica", "engine"])
def test_a_killed_replica_s_requests_end_in_503_and_all_others_are_answered(served, what):
    victim = served.replicas[0]
    restarts = served.metrics()["miss:engine_restarts_total"]
    target = victim if what == "replica" else next(c for c in victim.children() if "engine_process" in str(c.cmdline()))
    killed = []

    def harm():
        killed.append(time.monotonic())
        os.kill(target.pid, signal.SIGKILL)

    results = under_load(served, harm)
    assert {response.status_code for _, response in results} <= {200, 503}
    lost = [response for _, response in results if response.status_code == 503]
    for response in lost:
        assert checked(response, 503).json()["error"]["code"] in ("restarted", "not_ready")
    assert len(lost) <= 8 and len(results) > 50, (len(lost), len(results))  # four at a time ask
    late = [response.status_code for at, response in results if at > killed[0] + 2]
    assert late and set(late) == {200}, "the other replica answers meanwhile"
    wait(lambda: served.metrics()["miss:engine_restarts_total"] == restarts + 1, 60, "a new replica")
    assert len(served.replicas) == 2 and served.vqa(png(1), "ct").status_code == 200
    wait(served.idle, 10, "all gauges' being 0")


def test_clients_that_vanish_cancel_their_work(served):
    before = served.metrics()
    for number in range(30):
        body = {"image": data_url(png(100 + number)), "questions": ["which organ"] * 64}
        request = httpx.Request("POST", served.url + "/v1/vqa", json=body)
        connection = socket.create_connection(("127.0.0.1", request.url.port))
        head = f"POST /v1/vqa HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(request.content)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + request.content)
        time.sleep(0.01 * (number % 5))
        connection.close()
    wait(served.idle, 10, "all gauges' being 0")
    name = 'miss:requests_ended_total{outcome="cancelled"}'
    assert served.metrics()[name] - before[name] > 5
    assert served.vqa(png(1), "ct").status_code == 200


BACKPRESSURE = """
import asyncio, os, sys
import psutil
from miss.engine.serving.problems import Refused
from miss.engine.serving.service import _engine
from miss.engine.serving.settings import Settings
from miss.engine.serving.supervisor import Item

async def main():
    engine = _engine(Settings(sys.argv[1], ray_replicas=1, threads=1, max_batch_size=1, max_waiting=2), lambda: None)
    await engine.start()
    size = engine.model["preprocess"]["image_size"]
    (process,) = [p for p in psutil.Process().children(recursive=True) if "engine_process" in str(p.cmdline())]
    process.suspend()
    asking = [asyncio.create_task(engine.ask(bytes(size * size * 3), [Item("ct")], 30.0)) for _ in range(12)]
    await asyncio.sleep(2)
    refused = [task.exception() for task in asking if task.done()]
    assert {type(e) for e in refused} == {Refused} and {e.code for e in refused} == {"queue_full"}, refused
    process.resume()
    rest = await asyncio.gather(*[task for task in asking if not task.done()], return_exceptions=True)
    answered = sum(isinstance(one, list) for one in rest)
    print("refused", len(refused), "answered", answered)
    await engine.stop()
    # Ray counts one that it is still routing as waiting, so that of twelve at once two are taken at least
    assert len(refused) + answered == 12 and answered >= 2 and len(refused) >= 4

asyncio.run(main())
"""


def test_a_full_replica_and_a_full_queue_refuse(folder):
    """Two at a time in the replica and two that wait, by Ray's own bounds: the others are refused at once."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", BACKPRESSURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_checkpoint_that_is_not_there_is_said_in_one_line(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "miss", "serve", "--port", "0", "--ray", "--replicas", "1"]
    done = subprocess.run([*command, "--checkpoint", "nowhere"], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1 and "no checkpoint" in done.stderr.splitlines()[-1], done.stderr[-2000:]


def test_no_question_is_in_ray_s_logs_and_the_end_is_clean(served):
    """The last one: it ends the server."""
    served.client.post("/v1/vqa", json={"image": data_url(png(1)), "question": f"is {CANARY} there"})
    (logs,) = {Path(arg[10:]) for child in served.family for arg in child.cmdline() if arg.startswith("--log_dir=")}
    texts = [path.read_text(errors="replace") for path in logs.parent.rglob("*") if path.is_file()]
    assert len(texts) > 5 and not any(CANARY in text for text in texts)
    assert served.terminate() == 0
    errors = served.err.read_text()
    assert CANARY not in errors and "SIGTERM received" not in errors
    assert not [line for line in errors.splitlines() if not line.startswith("{")]
