"""Bodies that lie, clients that trickle, images that are none: a refusal each in bounded time, and nothing leaks."""

import contextlib
import threading
import time

import httpx
import pytest

from tests.engine.serving.broken import corpus
from tests.engine.serving.harness import checked, data_url, png, read_all, wait

KEY = "Authorization: Bearer secret-of-tests\r\n"
HEAD = f"POST /v1/vqa HTTP/1.1\r\nHost: localhost\r\n{KEY}Content-Type: application/json\r\n"


def status(answer):
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


def test_declared_sizes_are_refused_before_they_are_decoded(server, tight):
    named = dict(corpus(1, 0))
    for name in ("wide", "tall"):
        start = time.monotonic()
        checked(server.vqa(named[name], "ct"), 422, "image_too_many_pixels")
        assert time.monotonic() - start < 1
    checked(server.vqa(named["nothing"], "ct"), 422)
    checked(tight.vqa(named["bomb"][:-20] + bytes(120_000), "ct"), 422)
    assert server.vqa(png(1), "ct").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_with_and_without_a_length(tight, chunked):
    """The connection is closed with it: a client that still sends may see that before the answer."""
    name = 'miss:requests_rejected_total{reason="content_too_large"}'
    before = tight.law().get(name, 0)
    parts = (b"x" * 10_000 for _ in range(60))
    kind = {"content-type": "application/json"}
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        content = parts if chunked else b"".join(parts)
        checked(tight.client.post("/v1/vqa", content=content, headers=kind), 413, "content_too_large")
    wait(tight.idle, what="the bounds' being free")
    assert tight.law()[name] == before + 1


def test_a_length_that_lies_allocates_nothing(tight):
    connection = tight.raw(f"{HEAD}Content-Length: 199999\r\n\r\n{{}}".encode())
    start = time.monotonic()
    assert status(read_all(connection)) == 408 and time.monotonic() - start < 3
    answer = read_all(tight.raw(f"{HEAD}Content-Length: 4000000000\r\n\r\n0123456789".encode()))
    assert status(answer) == 413
    assert status(read_all(tight.raw(f"{HEAD}Content-Length: -5\r\n\r\n".encode()))) == 400
    assert status(read_all(tight.raw(f"{HEAD}Transfer-Encoding: chunked\r\n\r\nZZ\r\n".encode()))) in (400, 408)
    wait(tight.idle, what="the bounds' being free")
    tight.law()


def test_compressed_bodies_are_refused(server):
    kind = {"content-type": "application/json", "content-encoding": "gzip"}
    checked(server.client.post("/v1/vqa", content=b"\x1f\x8b", headers=kind), 415, "content_encoded")


def test_large_headers_are_refused(server):
    answer = read_all(server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 200_000 + b"\r\n\r\n"))
    assert not answer or status(answer) in (400, 431)
    assert server.client.get("/health").status_code == 200


def trickle(connection, data, seconds):
    """Sends a byte at a time; gives the seconds until it was closed."""
    start = time.monotonic()
    connection.settimeout(0.05)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(4096) == b"":
                break
        except TimeoutError:
            pass
        except ConnectionError:
            break
        if time.monotonic() - start > seconds:
            break
    return time.monotonic() - start


@pytest.mark.parametrize("what", ["headers", "body", "silent", "second"])
def test_slow_clients_are_closed_by_a_deadline_and_hold_nobody_up(tight, what):
    before = b""
    if what == "body":
        before = f"{HEAD}Content-Length: 10000\r\n\r\n".encode()
    if what == "second":  # headers that trickle on a connection that was kept
        before = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sent = b"" if what == "silent" else b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 500
    connections = [tight.raw(before) for _ in range(8)]
    if what == "second":
        for connection in connections:
            connection.recv(4096)
    took = [0.0] * len(connections)

    def slow(number):
        took[number] = trickle(connections[number], sent, 5) if sent else -1
        if not sent:
            start = time.monotonic()
            read_all(connections[number])
            took[number] = time.monotonic() - start

    threads = [threading.Thread(target=slow, args=(number,)) for number in range(len(connections))]
    for thread in threads:
        thread.start()
    image = png(20)
    for _ in range(5):
        assert tight.vqa(image, "ct").status_code == 200
    for thread in threads:
        thread.join()
    assert max(took) < 2.5, took
    wait(tight.idle, what="the bounds' being free")
    tight.law()


def test_no_more_is_taken_on_than_fits(tight):
    """Four questions at a time: of many requests each is answered or refused with 429, and all is free again."""
    body = {"image": data_url(png(21)), "questions": ["ct", "which organ", "left lung?"]}
    statuses, lock = [], threading.Lock()

    def ask():
        response = httpx.post(tight.url + "/v1/vqa", json=body, headers=tight.headers, timeout=30)
        with lock:
            statuses.append(response.status_code)
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "queue_full" and int(response.headers["retry-after"]) > 0

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and len(statuses) == 24
    wait(tight.idle, what="the bounds' being free")
    tight.law()


def test_a_request_s_time_runs_out(server):
    late = {"x-request-timeout": "0.0001"}
    body = {"image": data_url(png(22)), "question": "ct"}
    checked(server.client.post("/v1/vqa", json=body, headers=late), 504, "deadline")
    checked(server.client.post("/v1/vqa", json={**body, "timeout": 0.0001}), 504, "deadline")
    for wrong in ("soon", "-1", "nan", "0"):
        checked(server.client.post("/v1/vqa", json=body, headers={"x-request-timeout": wrong}), 400, "bad_timeout")
    wait(server.idle)
    server.law()
