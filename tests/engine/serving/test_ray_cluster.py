"""`miss serve --ray --ray-address`: fronts that join a Ray which an operator started, and leave its replicas there."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from miss import Engine
from tests.engine.serving.harness import data_url, png, wait
from tests.engine.serving.started import ROOT, Process

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray Serve is not installed (the extra `ray`)"),
]
SHUT_DOWN = (
    "import ray; from ray import serve; ray.init('auto', log_to_driver=False); serve.shutdown()"  # docs/ray.md's
)


class Cluster:
    """A head node of its own, on loopback."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--node-ip-address=127.0.0.1", "--block"]
        more = [f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false", "--num-cpus=4"]
        self.output = open(folder / "ray", "wb")
        self.process = subprocess.Popen(
            [*command, *more, f"--temp-dir={folder}/t"], stdout=self.output, stderr=self.output
        )
        wait(self.listens, 60, "Ray's start")

    def listens(self):
        assert self.process.poll() is None, Path(self.output.name).read_text()
        host, _, port = self.address.partition(":")
        with socket.socket() as one:
            return one.connect_ex((host, int(port))) == 0

    @property
    def replicas(self):
        family = psutil.Process(self.process.pid).children(recursive=True)
        return {child.pid for child in family if child.cmdline()[:1] and "ServeReplica" in child.cmdline()[0]}

    def close(self):
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self.output.close()
        _, alive = psutil.wait_procs(family, 10)
        for child in alive:
            child.kill()


@pytest.fixture
def cluster(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="miss-ray-", ignore_cleanup_errors=True) as folder:  # short: it has sockets
        token = Path(folder, "token")
        token.write_text(os.urandom(32).hex())
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # its node is 127.0.0.1
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        running = Cluster(Path(folder))
        yield running
        running.close()


def asked(front, seed):
    return front.client.post("/v1/vqa", json={"image": data_url(png(seed)), "question": "which organ"})


def test_fronts_share_a_cluster_s_replicas_and_leave_them(cluster, folder, tmp_path):
    def front(name, address):
        (tmp_path / name).mkdir()
        return Process(tmp_path / name, folder, "--ray", "--replicas", "2", "--threads", "1", "--ray-address", address)

    first = front("first", cluster.address)
    answer = asked(first, 1).json()["answers"][0]["answer"]
    assert answer == Engine.load(folder).answer(png(1), "which organ").text
    replicas = cluster.replicas
    second = front("second", "auto")
    assert len(replicas) == 2 and cluster.replicas == replicas, "one set for both"
    assert first.terminate() == 0 and cluster.replicas == replicas
    assert asked(second, 1).status_code == 200
    os.kill(min(replicas), signal.SIGKILL)
    statuses = [asked(second, seed).status_code for seed in range(40)]
    assert set(statuses) <= {200, 503} and statuses[-10:] == [200] * 10, statuses
    wait(lambda: len(cluster.replicas - {min(replicas)}) == 2, 60, "a new replica")
    wait(lambda: second.metrics()["miss:engine_restarts_total"] == 1, 60, "its being counted")
    assert second.terminate() == 0 and len(cluster.replicas) == 2
    subprocess.run([sys.executable, "-c", SHUT_DOWN], check=True, timeout=60, capture_output=True)
    wait(lambda: not cluster.replicas, 30, "the replicas' end")


def test_an_address_where_nobody_listens_is_said_at_once(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "miss", "serve", "--port", "0", "--ray", "--ray-address", address]
    start = time.monotonic()
    done = subprocess.run([*command, "--checkpoint", folder], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1 and time.monotonic() - start < 60
    assert f"nothing answers at {address}" in done.stderr.splitlines()[-1], done.stderr[-2000:]
