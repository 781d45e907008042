"""Processes that are killed, clients that vanish, many at once: each request ends, and its counters say how."""

import contextlib
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.engine.serving.harness import chat, checked, data_url, png, wait

QUESTIONS = ("is there a mass?", "which organ", "ct", "left lung?")


def test_an_engine_killed_thrice_ends_its_requests_and_comes_back(server):
    for _ in range(3):
        assert killed_engine(server) < 20  # 10 in soak, where nothing else wants the machine


def killed_engine(server):
    """Kills it while four ask -> seconds until it is ready again; every request has ended."""
    truth = server.vqa(png(1), *QUESTIONS).json()["answers"]
    restarts = server.metrics()["miss:engine_restarts_total"]
    first, results, lock = server.service.supervisor.process.pid, [], threading.Lock()
    stop = threading.Event()

    def ask(seed):
        body = {"image": data_url(png(seed)), "questions": list(QUESTIONS)}
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                response = client.post(server.url + "/v1/vqa", json=body)
                with lock:
                    results.append(response)
                if response.status_code == 503:
                    stop.wait(0.1)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    os.kill(first, signal.SIGKILL)
    start = time.monotonic()
    wait(lambda: httpx.get(server.url + "/ready").status_code == 503, 5, "its being seen")
    wait(server.ready, 30, "a new engine")
    took = time.monotonic() - start
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a request hangs"
    assert server.service.supervisor.process.pid != first
    assert {r.status_code for r in results} == {200, 503}
    for response in results:
        if response.status_code == 503:
            assert checked(response, 503).json()["error"]["code"] in ("restarted", "not_ready")
    assert [a["answer"] for a in server.vqa(png(1), *QUESTIONS).json()["answers"]] == [a["answer"] for a in truth]
    wait(server.idle)
    assert server.law()["miss:engine_restarts_total"] == restarts + 1
    return took


def test_an_engine_that_stands_still_is_started_anew(folder):
    from tests.engine.serving.harness import Running

    running = Running(folder, hang_timeout=1.0, decoders=1)
    try:
        first = running.service.supervisor.process.pid
        os.kill(first, signal.SIGSTOP)
        response = running.vqa(png(1), "ct")
        checked(response, 503, "restarted")
        wait(running.ready, 20)
        assert running.service.supervisor.process.pid != first and not psutil.pid_exists(first)
        assert running.vqa(png(1), "ct").status_code == 200
        running.law()
    finally:
        running.close()


def test_killed_decoders_cost_nobody_an_answer(server):
    killed_decoders(server, 6)


def killed_decoders(server, count):
    before = server.metrics().get('miss:image_workers_ended_total{reason="died"}', 0)
    for seed in range(count):
        for number in server.service.images.processes:
            with contextlib.suppress(ProcessLookupError):  # the last one's successor is not there yet
                os.kill(number, signal.SIGKILL)
        assert server.vqa(png(100 + seed), "ct").status_code == 200
    assert server.metrics()['miss:image_workers_ended_total{reason="died"}'] - before >= count
    wait(server.idle)
    server.law()


def test_a_decoder_that_stands_still_is_replaced(tight):
    os.kill(tight.service.images.processes[0], signal.SIGSTOP)
    start = time.monotonic()
    checked(tight.vqa(png(31), "ct"), 422, "image_too_slow")
    assert time.monotonic() - start < 4
    assert tight.vqa(png(32), "ct").status_code == 200
    tight.law()


def vanish(server, number, count):
    """Sends a request, or some of it, and goes away at a moment of its own."""
    body = {"image": data_url(png(number % 5)), "questions": list(QUESTIONS), "max_new_tokens": 40}
    if number % 3 == 0:
        body = chat("tiny", "which organ", png(number % 5), stream=True)
    path = "/v1/chat/completions" if number % 3 == 0 else "/v1/vqa"
    request = httpx.Request("POST", server.url + path, json=body)
    data = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    data += f"Content-Length: {len(request.content)}\r\n\r\n".encode() + request.content
    chance = random.Random(number)
    connection = server.raw(data[: len(data) if chance.random() < 0.75 else chance.randrange(len(data))])
    time.sleep(chance.uniform(0, 0.08))
    connection.close()


def vanishing(server, count):
    image = png(40)
    truth = server.vqa(image, *QUESTIONS).json()["answers"]
    before = server.law()
    with ThreadPoolExecutor(16) as pool:
        gone = [pool.submit(vanish, server, number, count) for number in range(count)]
        for _ in range(5):
            response = server.vqa(image, *QUESTIONS)
            assert response.status_code == 200
            told = response.json()["answers"]
            for one, other in zip(told, truth, strict=True):
                assert one["answer"] == other["answer"] and one["score"] == pytest.approx(other["score"], rel=1e-4)
        for one in gone:
            one.result()
    wait(server.idle, 10, "all gauges' being 0")
    after = server.law()
    name = 'miss:requests_ended_total{outcome="cancelled"}'
    assert after[name] - before[name] > count / 4
    failed = 'miss:requests_ended_total{outcome="failed"}'
    assert after[failed] == before[failed]
    assert server.vqa(image, "ct").status_code == 200


def test_two_hundred_clients_that_vanish_leave_nothing_behind(server):
    vanishing(server, 200)


@pytest.mark.soak
def test_two_thousand_clients_that_vanish(server):
    for _ in range(10):
        vanishing(server, 200)


@pytest.mark.soak
def test_engine_and_decoders_killed_twenty_times(server):
    took = [killed_engine(server) for _ in range(20)]
    assert max(took) < 10, took
    killed_decoders(server, 20)
    print(json.dumps({"ready_again_seconds": {"slowest": round(max(took), 2), "mean": round(sum(took) / 20, 2)}}))
