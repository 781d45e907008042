"""The nginx and systemd examples: their own programs accept them, and nginx passes questions on as the file says."""

import os
import shutil
import socket
import ssl
import subprocess
import sys

import httpx
import pytest

from tests.engine.serving.harness import Running, data_url, png, wait
from tests.engine.serving.test_process import ROOT

SERVING, KEY = ROOT / "examples" / "serving", "secret-of-tests"


def program(name):
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def test_systemd_accepts_the_unit(tmp_path):
    text = (SERVING / "miss.service").read_text().replace("/opt/miss/bin/miss", sys.executable)
    (tmp_path / "miss.service").write_text(text)
    command = [program("systemd-analyze"), "verify", "--man=no", str(tmp_path / "miss.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "miss.service" not in done.stderr, done.stderr


def test_the_unit_gives_what_the_server_needs():
    text = (SERVING / "miss.service").read_text()
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert lines["KillMode"] == "mixed" and int(lines["TimeoutStopSec"]) > 30 and lines["LimitCORE"] == "0"


@pytest.fixture
def nginx(folder, tmp_path):
    """The example in front of a server with a key, on a port of its own and with a certificate of its own."""
    binary, openssl = program("nginx"), program("openssl")
    name = ["-subj", "/CN=vqa.example.org", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *name]
        + ["-keyout", "vqa.key", "-out", "vqa.pem", "-days", "2"], cwd=tmp_path, check=True, capture_output=True
    )  # fmt: skip
    running = Running(folder, api_key=KEY, decoders=1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = (SERVING / "nginx.conf").read_text()
    for said, here in (
        ("127.0.0.1:8000", f"127.0.0.1:{running.address[1]}"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl/", f"{tmp_path}/"),
    ):
        assert said in text
        text = text.replace(said, here)
    temporary = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy"))
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "whole.conf").write_text(
        f"{user} daemon off; pid {tmp_path}/pid; events {{}} http {{ {temporary}\n{text}\n}}"
    )
    command = [binary, "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "whole.conf")]
    yield running, command, port, tmp_path
    running.close()


def test_nginx_accepts_its_file_and_passes_questions_on(nginx):
    running, command, port, folder = nginx
    lint = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=30)
    assert lint.returncode == 0 and "[warn]" not in lint.stderr, lint.stderr
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        context = ssl.create_default_context(cafile=folder / "vqa.pem")
        client = httpx.Client(base_url=f"https://localhost:{port}", verify=context, headers=running.headers)
        wait(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, what="nginx's listening")
        image = png(1, (900, 900))  # 2.4 MB: more than nginx's own buffers would hold
        told = client.post("/v1/vqa", json={"image": data_url(image), "question": "ct"})
        assert told.status_code == 200 and told.json()["answers"] and len(told.headers["x-request-id"]) == 32
        assert not [path for path in (folder / "client_body").rglob("*") if path.is_file()]
        assert httpx.get(f"https://localhost:{port}/v1/models", verify=context).status_code == 401
        assert client.get("/metrics").status_code == 404
        large = client.post("/v1/vqa", content=b"x" * (33 << 20), headers={"content-type": "application/json"})
        assert large.status_code == 413
    finally:
        process.terminate()
        process.wait(10)
