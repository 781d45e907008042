"""`python -m tests.engine.serving.slow JSON`: clients that send or read as slowly as they can, in one process.

Knows sockets; does not know the server's deadlines. Prints after how many seconds each was closed; with `seconds` each
comes again until these are over, and they begin one after another, not all at once.
"""

import asyncio
import contextlib
import json
import resource
import socket
import sys
import time

HEAD = "POST /v1/vqa HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


async def trickle(address, before, longest, tick):
    """A byte each tick -> seconds until it was closed, or None."""
    reader, writer = await asyncio.open_connection(*address)
    start, closed = time.monotonic(), asyncio.create_task(ended(reader))
    writer.write(before)
    while not closed.done() and time.monotonic() - start < longest:
        writer.write(b"a")
        await asyncio.wait({closed}, timeout=tick)
    writer.transport.abort()
    return round(time.monotonic() - start, 3) if closed.done() else await given_up(closed)


async def ended(reader):
    with contextlib.suppress(ConnectionError):
        await reader.read(-1)


async def given_up(task):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def unread(address, before, longest, tick):
    """Reads a byte each tick, with the smallest of buffers -> seconds until it was closed, or None."""
    loop, connection = asyncio.get_running_loop(), socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.setblocking(False)
    await loop.sock_connect(connection, tuple(address))
    start = time.monotonic()
    try:
        await asyncio.wait_for(loop.sock_sendall(connection, before), longest)
        while time.monotonic() - start < longest:
            await asyncio.sleep(tick)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or not await loop.sock_recv(connection, 1):
                return round(time.monotonic() - start, 3)
    except ConnectionError:
        return round(time.monotonic() - start, 3)
    finally:
        connection.close()
    return None


async def again(act, text, given, number, count):
    """One client, or one after another."""
    if not given["seconds"]:
        return [await act(given["address"], text, given["longest"], given["tick"])]
    end, took = time.monotonic() + given["seconds"], []
    await asyncio.sleep(given["spread"] * number / count)
    while time.monotonic() < end:
        took.append(await act(given["address"], text, given["longest"], given["tick"]))
    return took


async def main(given):
    kinds = {
        "headers": (trickle, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "),
        "body": (trickle, HEAD.format(100_000).encode()),
        "reader": (unread, HEAD.format(len(given["large"])).encode() + given["large"].encode()),
        "pipeline": (unread, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 30),
    }
    clients = [(kind, *kinds[kind]) for kind, number in given["clients"].items() for _ in range(number)]
    acts = [again(act, text, given, n, len(clients)) for n, (_, act, text) in enumerate(clients)]
    took = await asyncio.gather(*acts)
    told = {}
    for (kind, *_), seconds in zip(clients, took, strict=True):
        told.setdefault(kind, []).extend(seconds)
    print(json.dumps(told))


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(json.loads(sys.stdin.readline())))
