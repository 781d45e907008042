"""`python -m tests.engine.serving.crowd JSON`: many connections of one client process, all open before any asks.

Knows sockets and what each connection should be answered; does not know the server. It says "ready" when all are
open, sends on all when a line comes in, and prints how they ended.
"""

import asyncio
import json
import resource
import sys
import time


def request(number, body):
    head = f"POST /v1/vqa HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: n-{number}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def judged(answer, number, truth):
    """(status, what is wrong or None)."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if len(lines[0].split()) < 2:
        return 0, "no answer"
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    status = int(lines[0].split()[1])
    if headers.get("x-request-id") != f"n-{number}":
        return status, "another's request id"
    if status == 200 and json.loads(body)["answers"][0]["answer"] != truth:
        return status, "another's answer"
    if status == 429 and "retry-after" not in headers:
        return status, "no retry-after"
    return status, None


async def one(given, number, go):
    """One connection's life -> (status, what is wrong, seconds)."""
    kind = number % len(given["asked"])
    body, truth = given["asked"][kind]
    reader, writer = await asyncio.open_connection(*given["address"], local_addr=(given["source"], 0))
    given["open"].release()
    await go.wait()
    start, answer = time.monotonic(), b""
    try:
        writer.write(request(number, body.encode()))
        answer = await reader.read(-1)
    except ConnectionError as error:
        return 0, type(error).__name__, time.monotonic() - start
    finally:
        writer.close()
    return *judged(answer, number, truth), time.monotonic() - start


async def main(given):
    go, numbers = asyncio.Event(), range(given["first"], given["first"] + given["count"])
    given["open"] = asyncio.Semaphore(0)
    connections = [asyncio.create_task(one(given, number, go)) for number in numbers]
    for _ in numbers:
        await given["open"].acquire()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    go.set()
    ended = await asyncio.gather(*connections)
    statuses = {}
    for status, _, _ in ended:
        statuses[status] = statuses.get(status, 0) + 1
    wrong = [f"n-{n}: {what}" for n, (_, what, _) in zip(numbers, ended, strict=True) if what is not None]
    print(json.dumps({"statuses": statuses, "wrong": wrong, "seconds": max(took for *_, took in ended)}))


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(json.loads(sys.stdin.readline())))
