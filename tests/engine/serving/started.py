"""`miss serve` as users start it: a process of its own, its output in files, its memory and descriptors to be read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from tests.engine.serving.harness import Counted, data_url, wait

ROOT = Path(__file__).resolve().parents[3]


class Process(Counted):
    """`url`, `client`; `terminate` drains it. Everything about it is read from outside."""

    def __init__(self, folder, checkpoint, *flags, key=None):
        self.out, self.err, self.tmp = folder / "out", folder / "err", folder / "tmp"
        self.tmp.mkdir()
        env = {**os.environ, "TMPDIR": str(self.tmp), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if key is not None:
            env["MISS_API_KEY"] = key
        command = [sys.executable, "-P", "-m", "miss", "serve", "--port", "0", "--checkpoint", str(checkpoint), *flags]
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        wait(lambda: "http://" in self.out.read_text() or self.process.poll() is not None, 30, "its listening")
        assert self.process.poll() is None, self.err.read_text()
        self.url = next(word for word in self.out.read_text().split() if word.startswith("http://"))
        host, _, port = self.url.removeprefix("http://").partition(":")
        self.address = (host, int(port))
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.client = httpx.Client(base_url=self.url, headers=self.headers, timeout=30)
        wait(self.ready, 60, "its being ready")

    @property
    def family(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def engine(self):
        return next(child for child in self.family if "miss.engine.serving.engine_process" in child.cmdline())

    @property
    def decoders(self):
        return [child for child in self.family if "miss.engine.serving.image_worker" in child.cmdline()]

    def memory(self):
        """Resident bytes by part."""
        front = psutil.Process(self.process.pid).memory_info().rss
        decoders = sum(decoder.memory_info().rss for decoder in self.decoders)
        return {"front": front, "engine": self.engine.memory_info().rss, "decoders": decoders}

    def descriptors(self):
        return psutil.Process(self.process.pid).num_fds()

    def lines(self):
        """What it logged."""
        return [json.loads(line) for line in self.err.read_text().splitlines()]

    def took(self, image, question="which organ"):
        """Seconds of one question."""
        start = time.perf_counter()
        response = self.client.post("/v1/vqa", json={"image": data_url(image), "question": question})
        assert response.status_code == 200, response.text
        return time.perf_counter() - start

    def terminate(self):
        """SIGTERM -> the exit code, when it and all its children are gone."""
        family = self.family
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(40)
        wait(lambda: not any(child.is_running() for child in family), 5, "its children's end")
        return code
