"""What a connection carries: offers of other protocols, several requests at once, trailers, and what is no HTTP."""

import json
import socket
import time

import pytest
import uvicorn

from miss.engine.serving.connection import MAX_HEADERS, MAX_PIPELINED, protocol
from tests.engine.serving.harness import data_url, png, read_all, wait

OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"


def answers(data, count):
    """(status, body) of so many answers, and nothing after them."""
    found = []
    for _ in range(count):
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:"))
        found.append((int(lines[0].split()[1]), rest[:length]))
        data = rest[length:]
    assert not data
    return found


def post(body, *lines, last=False):
    more = "".join(f"{line}\r\n" for line in (*lines, *(["Connection: close"] if last else [])))
    return f"POST /v1/vqa HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}\r\n".encode() + body


def asked():
    return json.dumps({"image": data_url(png(31)).partition(",")[2], "question": "ct"}).encode()


def chunks(body, size=100):
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[i : i + size] for i in range(0, len(body), size)))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_an_offer_of_another_protocol_changes_nothing(server, chunked, at_once):
    """Java's client makes it with each request. Twice on one connection, whole or in pieces that split the headers."""
    body = asked()
    sent = chunks(body) + b"0\r\n\r\n" if chunked else body
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    data = post(sent, OFFER.rstrip(), length) * 2 + post(body, f"Content-Length: {len(body)}", last=True)
    connection = server.raw(data if at_once else b"")
    for start in () if at_once else range(0, len(data), 150):
        connection.sendall(data[start : start + 150])
        time.sleep(0.0005)
    found = answers(read_all(connection), 3)
    assert [status for status, _ in found] == [200] * 3, found
    assert len({json.loads(body)["answers"][0]["answer"] for _, body in found}) == 1
    server.law()


def test_requests_that_are_sent_at_once_are_answered_in_turn(server):
    gets = b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in (b"/health", b"/nowhere") * 5)
    body = asked()
    found = answers(read_all(server.raw(gets + post(body, f"Content-Length: {len(body)}", last=True))), 11)
    assert [status for status, _ in found] == [200, 404] * 5 + [200]


def test_more_than_a_few_at_once_end_the_connection(server):
    many = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * (2 * MAX_PIPELINED)
    assert read_all(server.raw(many)).count(b"HTTP/1.1 200") <= 1
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
        "GET /hä HTTP/1.1\r\nHost: a\r\n\r\n".encode("latin-1"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"a" * MAX_HEADERS + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        post(b"2\r\n{}\r\n0\r\n" + b"X: " + b"a" * MAX_HEADERS + b"\r\n\r\n", "Transfer-Encoding: chunked"),
        post(b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * MAX_HEADERS, "Transfer-Encoding: chunked"),
        post(b"2;" + b"a" * 8 * MAX_HEADERS, "Transfer-Encoding: chunked"),
    ],
)
def test_what_is_no_request_is_refused_at_once(server, data):
    start = time.monotonic()
    answer = read_all(server.raw(data))
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1, answer[:200]
    assert time.monotonic() - start < 5
    wait(server.idle)
    server.law()


def test_whoever_leaves_before_the_first_of_several_is_answered_costs_no_error(server):
    """The first is under way while the others wait: it is cancelled, and those never begin."""
    body = asked()
    before = server.law()
    for _ in range(5):
        connection = server.raw(post(body, f"Content-Length: {len(body)}") * 3)
        time.sleep(0.003)
        connection.close()
    wait(server.idle)
    after = server.law()
    assert all(after[name] == before.get(name, 0) for name in after if "failed" in name)
    assert after["miss:requests_received_total"] <= before["miss:requests_received_total"] + 3 * 5


def test_an_answer_to_a_connection_that_just_broke_is_no_error(caplog):
    """Its head could not be written; the body follows before anybody is told."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        next(iter(one.server_state.connections)).transport.abort()
        await send({"type": "http.response.body", "body": b"a"})
        one.should_exit = True

    config = uvicorn.Config(app, http=protocol(5, 5), loop="uvloop", lifespan="off", log_config=None)
    one = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        one.run([listening])
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text


def test_garbage_after_a_request_is_not_answered_in_its_place(server):
    """Whoever reads in turn would take a 400 for the answer to the question."""
    body = asked()
    answer = read_all(server.raw(post(body, f"Content-Length: {len(body)}") + b"\0\0\0"))
    assert b" 400 " not in answer[:20]
    wait(server.idle)
    server.law()


def test_trailers_are_no_headers(tight):
    """A key that comes after the body opens nothing."""
    body = b"2\r\n{}\r\n0\r\nAuthorization: Bearer secret-of-tests\r\nX-Request-Id: 7\r\n\r\n"
    assert b"HTTP/1.1 401 " in read_all(tight.raw(post(body, "Transfer-Encoding: chunked", last=True)))


def test_an_old_client_is_answered(server):
    answer = read_all(server.raw(b"GET /health HTTP/1.0\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" in answer.lower()


@pytest.mark.parametrize("rest", [b"\r\n", b"GET", b""])
def test_blank_lines_and_what_follows_a_refusal_have_a_deadline_too(tight, rest):
    connection = tight.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.recv(4096)
    start = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - start < 6:
        try:
            connection.sendall(rest)
            if connection.recv(4096) == b"":
                break
        except TimeoutError:
            rest = rest[:2]  # b"GE" again is no method, and refused
        except ConnectionError:
            break
    assert time.monotonic() - start < 2.5
