"""A server in a thread of the test's process, over real sockets, with a real engine in its own process; and helpers."""

import base64
import io
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from miss.engine.serving.server import Server
from miss.engine.serving.settings import Settings

LEAKS = re.compile(rb"0x[0-9a-f]{6,}|Traceback|File \"|/work/|/usr/|/tmp/|site-packages|\.py\b")


def wait(condition, seconds=10.0, what="it"):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true in {seconds} s")


def png(seed=0, size=(40, 30)):
    random = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chat(model, question, image, **more):
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": data_url(image)}}]
    return {"model": model, "messages": [{"role": "user", "content": parts}], **more}


class Counted:
    """A server that is there: `url`, `address`, `client`. Its counters, and connections to it."""

    def ready(self):
        return httpx.get(self.url + "/ready").status_code == 200

    def metrics(self):
        lines = [line for line in self.client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def law(self, in_flight=0):
        """The counters' law, with so many under way; gives the counts back."""
        found = self.metrics()
        ended = {key: value for key, value in found.items() if key.startswith("miss:requests_ended_total")}
        assert len(ended) == 4
        assert found["miss:requests_in_flight"] == in_flight
        assert found["miss:requests_received_total"] == sum(ended.values()) + in_flight
        return found

    def idle(self):
        """Whether nothing is under way in the server or the engine."""
        found = self.metrics()
        gauges = [v for k, v in found.items() if k.startswith(("miss:num_requests", "miss:answer_slots"))]
        return found["miss:requests_in_flight"] == 0 and not any(gauges)

    def raw(self, data=b"", seconds=30):
        """A connection on which `data` was sent."""
        connection = socket.create_connection(self.address, timeout=seconds)
        connection.sendall(data)
        return connection


class Running(Counted):
    """A started server. `url`, `client`, `service`; `close` drains it."""

    def __init__(self, checkpoint: Path, **settings):
        self.settings = Settings(checkpoint=str(checkpoint), port=0, threads=1, **settings)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.address = self.socket.getsockname()
        self.server = Server(self.settings, "test")
        self.service = self.server.app.state.service
        self._thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self._thread.start()
        key = self.settings.api_key
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.client = httpx.Client(base_url=self.url, timeout=30, headers=self.headers)
        wait(self.ready, 60, "the server's being ready")

    def vqa(self, image, *questions, **fields):
        body = {"image": data_url(image), "questions": list(questions), **fields}
        return self.client.post("/v1/vqa", json=body)

    def chat(self, question, image, **more):
        return self.client.post("/v1/chat/completions", json=chat("tiny", question, image, **more))

    def idle(self):
        """Whether nothing is under way anywhere: in the server, its bounds or the engine."""
        admission = self.service.admission
        held = admission.questions.held + admission.pixels.held + admission.bodies.held
        return held == 0 and super().idle()

    def close(self):
        self.client.close()
        self.server.drain()
        self._thread.join(30)
        assert not self._thread.is_alive()


def read_all(connection):
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionError:
        pass
    return data


def checked(response, status, code=None):
    """A problem's response: its status and word, nothing of the machine in its text."""
    assert response.status_code == status, (response.status_code, response.text[:500])
    assert not LEAKS.search(response.content), response.text
    if code is not None:
        assert response.json()["error"]["code"] == code, response.text
    return response
