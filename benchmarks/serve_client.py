"""The clients of a server under load, all in one process of their own: open loop by the clock, or a number at a time.

    python -m miss.benchmarks.serve_client PICTURES.json

Knows HTTP and images' bytes; does not know which server it speaks to, or what is made of the times. Imports no torch.
Everything that is sent is made before the clock starts. Requests (JSON lines on standard input) and their replies:
  {"do": "open", "target": {…}, "cell": {…}, "due": [seconds…], "patience": seconds}      {"visits": [{…}…]}
  {"do": "closed", "target": {…}, "cell": {…}, "count": visits, "at_once": number}        {"visits": [{…}…]}
  {"do": "single", "target": {…}, "cell": {…}, "count": visits}                           {"visits": [{…}…]}
target: url, path, fields (of every request), together (all questions in one request).
cell: questions (of a visit), images (how many different ones come round, 0: none comes twice), first (the number of
the first visit, so that no image of another load is sent again).
"""

import asyncio
import base64
import http.client
import io
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from PIL import Image

from miss.benchmarks.serve_figures import STAGES, Visit

_STAMP = 32  # pixels a side of the noise that makes an image another one, also after resizing
Body = list[bytes]  # the requests of one visit


class Pictures:
    """Files of images, each of them as many different images as one likes; and questions."""

    def __init__(self, paths: list[str], questions: list[str]) -> None:
        self.images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        self.questions = questions

    def image(self, number: int) -> bytes:
        """JPEG of an image that only this number has."""
        pixels = self.images[number % len(self.images)].copy()
        noise = np.random.default_rng(number).integers(0, 256, (_STAMP, _STAMP, 3), dtype=np.uint8)
        height, width = (min(_STAMP, size) for size in pixels.shape[:2])
        pixels[:height, :width] = noise[:height, :width]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        return file.getvalue()

    def body(self, number: int, cell: dict[str, Any], target: dict[str, Any]) -> Body:
        """What visit `number` sends."""
        image = base64.b64encode(self.image(number % cell["images"] if cell["images"] else number)).decode()
        asked = [self.questions[(number + i) % len(self.questions)] for i in range(cell["questions"])]
        each = [{"questions": asked}] if target["together"] else [{"question": text} for text in asked]
        return [json.dumps({"image": image, **one, **target["fields"]}).encode() for one in each]


class Client:
    """One connection a request that is under way, kept for the next."""

    def __init__(self, session: aiohttp.ClientSession, target: dict[str, Any]) -> None:
        self._session, self._url = session, target["url"] + target["path"]

    async def visit(self, body: Body, due: float, start: float, patience: float) -> Visit:
        """All requests of a visit at once; it is over with the last of them."""
        sent, problem, found = time.perf_counter() - start, "", []
        try:
            async with asyncio.timeout(max(0.0, due + patience - sent)):
                found = await asyncio.gather(*map(self._ask, body))
                problem = next((problem for problem, _ in found if problem), "")
        except TimeoutError:
            problem = "late"
        except aiohttp.ClientError as error:
            problem = type(error).__name__
        done = due + patience if problem == "late" else time.perf_counter() - start
        answers = [answer for _, several in found for answer in several]
        seconds = [answer["seconds"] for answer in answers if "seconds" in answer]
        stages = {name: max(max(0.0, one[name]) for one in seconds) for name in STAGES} if seconds else {}
        return Visit(due, sent, done, problem, stages, tuple(answer["answer"] for answer in answers))

    async def _ask(self, data: bytes) -> tuple[str, list[dict[str, Any]]]:
        """(the problem or nothing, the answers of one request)."""
        async with self._session.post(self._url, data=data, headers={"Content-Type": "application/json"}) as response:
            text = await response.read()
        return read(response.status, text)


def read(status: int, text: bytes) -> tuple[str, list[dict[str, Any]]]:
    """(the problem or nothing, the answers of one request)."""
    if status != 200:
        return str(status), []
    found = json.loads(text)
    return "", found["answers"] if "answers" in found else [found]


def single(target: dict[str, Any], bodies: list[Body]) -> list[Visit]:
    """One after another on one connection of the standard library's client, which adds the least of its own."""
    url, start, visits = urlsplit(target["url"]), time.perf_counter(), []
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
    for (data,) in bodies:
        sent = time.perf_counter() - start
        connection.request("POST", target["path"], data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        done = time.perf_counter() - start
        problem, answers = read(response.status, text)
        visits.append(Visit(sent, sent, done, problem, {}, tuple(answer["answer"] for answer in answers)))
    connection.close()
    return visits


async def open_loop(client: Client, bodies: list[Body], due: list[float], patience: float) -> list[Visit]:
    """Every visit begins when it is due, whatever has become of those before it."""
    start = time.perf_counter() + 0.05

    async def one(body: Body, when: float) -> Visit:
        await asyncio.sleep(when - (time.perf_counter() - start))
        return await client.visit(body, when, start, patience)

    return list(await asyncio.gather(*map(one, bodies, due)))


async def closed_loop(client: Client, bodies: list[Body], at_once: int, patience: float) -> list[Visit]:
    """So many at a time: the next begins when one is over."""
    start, waiting, found = time.perf_counter(), iter(bodies), []

    async def one() -> None:
        for body in waiting:
            found.append(await client.visit(body, time.perf_counter() - start, start, patience))

    await asyncio.gather(*(one() for _ in range(at_once)))
    return found


async def answer(request: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    target, cell, patience = request["target"], request["cell"], request.get("patience", 60.0)
    count = len(request["due"]) if request["do"] == "open" else request["count"]
    bodies = [pictures.body(cell["first"] + i, cell, target) for i in range(count)]
    if request["do"] == "single":
        return {"visits": [asdict(visit) for visit in single(target, bodies)]}
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = Client(session, target)
        if request["do"] == "open":
            visits = await open_loop(client, bodies, request["due"], patience)
        else:
            visits = await closed_loop(client, bodies, request["at_once"], patience)
    return {"visits": [asdict(visit) for visit in visits]}


def main() -> None:
    pictures = Pictures(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    for line in sys.stdin:
        print(json.dumps(asyncio.run(answer(json.loads(line), pictures))), flush=True)


if __name__ == "__main__":
    main()
