"""Processes that are killed, clients that vanish, many at once: each request ends, and its counters say how."""

import contextlib
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.engine.serving.harness import chat, checked, data_url, png, read_all, wait

QUESTIONS = ("is there a mass?", "which organ", "ct", "left lung?")


def test_a_killed_engine_ends_its_requests_and_comes_back(server):
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
    assert took < 10 and server.service.supervisor.process.pid != first
    assert {r.status_code for r in results} == {200, 503}
    for response in results:
        if response.status_code == 503:
            assert checked(response, 503).json()["error"]["code"] in ("restarted", "not_ready")
    assert [a["answer"] for a in server.vqa(png(1), *QUESTIONS).json()["answers"]] == [a["answer"] for a in truth]
    wait(server.idle)
    assert server.law()["miss:engine_restarts_total"] == restarts + 1


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
    for seed in range(6):
        for number in server.service.images.processes:
            with contextlib.suppress(ProcessLookupError):  # the last one's successor is not there yet
                os.kill(number, signal.SIGKILL)
        assert server.vqa(png(100 + seed), "ct").status_code == 200
    assert server.metrics()['miss:image_workers_ended_total{reason="died"}'] >= 6
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
    connection = server.raw(data[: len(data) if number % 4 else len(data) // 2])
    time.sleep(0.05 * (number % 7) / 7)
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
    assert server.vqa(image, "ct").status_code == 200


def test_clients_that_vanish_leave_nothing_behind(server):
    vanishing(server, 60)


def crowd(server, count):
    """So many connections at once, each with an image of its own kind and its own request id."""
    images = [png(seed) for seed in range(8)]
    truth = [server.vqa(image, "which organ").json()["answers"][0]["answer"] for image in images]
    statuses, wrong, lock = [], [], threading.Lock()
    connections = []
    for number in range(count):
        request = httpx.Request(
            "POST", server.url, json={"image": data_url(images[number % 8]), "question": "which organ"}
        )
        data = f"POST /v1/vqa HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: n-{number}\r\nConnection: close\r\n"
        data += f"Content-Type: application/json\r\nContent-Length: {len(request.content)}\r\n\r\n"
        connections.append(server.raw(data.encode() + request.content, 120))

    def read(number):
        answer = read_answer(connections[number])
        with lock:
            statuses.append(answer[0])
            if answer[1] != f"n-{number}" or (answer[0] == 200 and answer[2] != truth[number % 8]):
                wrong.append(number)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(read, range(count)))
    assert len(statuses) == count and set(statuses) <= {200, 429}, set(statuses)
    assert not wrong, "an answer came to another's connection"
    return statuses.count(200)


def read_answer(connection):
    head, _, body = read_all(connection).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    status = int(lines[0].split()[1])
    answer = json.loads(body)["answers"][0]["answer"] if status == 200 else None
    return status, headers["x-request-id"], answer


def test_three_hundred_connections_at_once(server):
    memory = psutil.Process().memory_info().rss
    assert crowd(server, 300) == 300
    assert psutil.Process().memory_info().rss - memory < 200 << 20
    start = time.monotonic()
    assert server.vqa(png(1), "ct").status_code == 200 and time.monotonic() - start < 5
    wait(server.idle)
    server.law()


@pytest.mark.soak
def test_two_thousand_connections_at_once(server):
    print("answered", crowd(server, 2000))
    wait(server.idle)
    server.law()


@pytest.mark.soak
def test_two_hundred_clients_that_vanish(server):
    vanishing(server, 200)


@pytest.mark.soak
def test_an_engine_killed_twenty_times(server):
    for _ in range(20):
        test_a_killed_engine_ends_its_requests_and_comes_back(server)
