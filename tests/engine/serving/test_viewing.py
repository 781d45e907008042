"""`/v1/image` against the engine's own decoding, and the page's files as they are given out. No browser."""

import base64
import io
import json
import os
import re
import signal
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from miss.engine.data.images import decode_image
from miss.engine.data.processor import stretch
from miss.engine.serving.auth import PUBLIC
from miss.engine.serving.pages import FILES, FOLDER, PATHS, POLICY
from miss.engine.serving.viewing import png as written
from miss.models.config import PreprocessConfig
from tests.engine.serving.broken import picture
from tests.engine.serving.harness import checked, data_url, png

ROOT = Path(__file__).resolve().parents[3]
PREPROCESS = PreprocessConfig(image_size=28, resample="bicubic")
ELSEWHERE = re.compile(r"https?://(?!www\.w3\.org/2000/svg)")
KEEPS = re.compile(r"localStorage|sessionStorage|indexedDB|document\.cookie|caches\b|serviceWorker")
FROM_THE_ROOT = re.compile(r"(?:src|href)=[\"']/|[\"'`]/?/(?:page|docs|ready|version|openapi|health)")
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function")


def pixels(found):
    head, _, text = found["png"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)))


def series():
    pydicom = pytest.importorskip("pydicom")
    assert pydicom
    from tests.engine.test_images import dicom_file

    return dicom_file(
        (np.arange(3 * 20 * 30) * 7 % 1000).astype(np.int16).reshape(3, 20, 30), WindowCenter=500, WindowWidth=400
    )


def test_the_pixels_are_those_that_the_model_is_given(server):
    for data in (png(1), picture("CMYK", kind="JPEG"), picture("RGBA"), picture(kind="WEBP"), picture("I;16")):
        truth = stretch(decode_image(data), PREPROCESS)
        told = server.client.post("/v1/image", json={"image": data_url(data)})
        form = server.client.post("/v1/image", files={"image": data})
        assert told.status_code == form.status_code == 200 and told.headers["x-request-id"] == told.json()["id"]
        assert (pixels(told.json()) == truth).all() and (pixels(form.json()) == truth).all()
        assert told.json()["size"] == 28 and told.json()["window"] is None


def test_frames_and_windows(server):
    data = series()
    plain = server.client.post("/v1/image", files={"image": data}).json()
    expected = {"format": "DICOM", "width": 30, "height": 20, "num_frames": 3, "frame": 1, "windowed": True}
    assert {name: plain[name] for name in expected} == expected and plain["window"] == [500, 400]
    asked = {"frame": "2", "window": ["100", "1200"]}
    other = server.client.post("/v1/image", files={"image": data}, data=asked).json()
    assert other["frame"] == 2 and other["window"] == [100, 1200]
    assert (pixels(other) == stretch(decode_image(data, frame=2, window=(100, 1200)), PREPROCESS)).all()
    assert (pixels(plain) == stretch(decode_image(data), PREPROCESS)).all() and (pixels(plain) != pixels(other)).any()


def test_refusals(server):
    def post(**more):
        return server.client.post("/v1/image", **more)

    checked(post(json={"image": data_url(b"no image")}), 422, "image_not_an_image")
    checked(post(json={"image": "https://example.org/a.png"}), 422, "image_url_refused")
    checked(post(json={"image": data_url(png())[:-40]}), 422)
    checked(post(json={"image": data_url(png()), "frame": 4}), 422, "image_no_such_frame")
    checked(post(json={"image": data_url(png()), "window": [1.0, 2.0]}), 422, "image_bad_option")
    checked(post(json={"image": data_url(png()), "window": [1.0]}), 400, "bad_request")
    checked(post(json={"image": data_url(png()), "question": "ct"}), 400, "bad_request")
    checked(post(json={}), 400, "bad_request")
    checked(post(content=b"{", headers={"content-type": "application/json"}), 400, "bad_json")
    checked(post(content=b"x", headers={"content-type": "image/png"}), 415, "unsupported_media_type")
    checked(post(files={"image": b""}), 422, "image_empty")
    checked(post(files={"other": b"x"}), 400, "image_required")
    checked(post(json={"image": data_url(png())}, headers={"x-request-timeout": "soon"}), 400, "bad_timeout")
    server.law()


def test_it_is_bounded_and_counted_as_questions_are(server, tight):
    before = server.law()
    server.client.post("/v1/image", json={"image": data_url(png(31))})
    server.client.post("/v1/image", json={"image": data_url(b"no image")})
    after = server.law()
    risen = {name: after[name] - before.get(name, 0) for name in after}
    assert risen["miss:requests_received_total"] == 2 and risen['miss:requests_ended_total{outcome="answered"}'] == 1
    assert risen['miss:http_requests_total{handler="/v1/image",method="POST",status="200"}'] == 1
    assert risen['miss:image_rejected_total{reason="image_not_an_image"}'] == 1
    assert risen.get('miss:e2e_request_latency_seconds_count{model_name="tiny"}', 0) == 0  # no question was answered
    bound = tight.service.admission.questions
    bound.take(4)
    try:
        refused = checked(tight.client.post("/v1/image", json={"image": data_url(png())}), 429, "queue_full")
        assert refused.headers["retry-after"]
    finally:
        bound.free(4)
    assert tight.client.post("/v1/image", json={"image": data_url(png())}).status_code == 200
    checked(tight.client.post("/v1/image", content=bytes(300_000)), 413, "content_too_large")
    tight.law()
    assert tight.idle()


def test_its_time_ends(server):
    processes = server.service.images.processes
    try:
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        late = server.client.post("/v1/image", json={"image": data_url(png(41)), "timeout": 0.05})
        checked(late, 504, "deadline")
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)
    assert server.client.post("/v1/image", json={"image": data_url(png(41))}).status_code == 200
    server.law()


@pytest.mark.parametrize("size", [1, 7, 224])
def test_a_written_png_is_read_by_pillow(size):
    truth = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(written(truth.tobytes(), size)))) == truth).all()


def test_the_page_is_its_files_and_nothing_else_is_public(tight):
    """Without a token: what is given out is what anybody can read in the package."""
    assert PUBLIC == {"/health", "/ready"} | PATHS
    for path, name in FILES.items():
        response = httpx.get(tight.url + path)
        assert response.status_code == 200 and response.content == (FOLDER / name).read_bytes(), path
        assert response.headers["content-security-policy"] == POLICY and "unsafe" not in POLICY
        assert (
            response.headers["x-content-type-options"] == "nosniff" and response.headers["cache-control"] == "no-store"
        )
        assert "set-cookie" not in response.headers
    for path in ("/page/", "/page/index.html", "/page/../auth.py", "/page/%2e%2e/auth.py", "/page/main.js/"):
        assert httpx.get(tight.url + path).status_code == 401, path
        assert tight.client.get(path).status_code == 404, path


def test_the_files_load_keep_and_inject_nothing():
    for name in FILES.values():
        text = (FOLDER / name).read_text()
        assert not ELSEWHERE.search(text), name
        assert not KEEPS.search(text) and not MARKUP.search(text), name
        assert not FROM_THE_ROOT.search(text), name  # behind a proxy they may stand under a path of its own
        if name.endswith(".html"):
            assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", text), name
            assert "Research use only" in text


def test_every_file_is_named_in_the_wheel():
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "miss.engine.serving"
    ]
    for name in FILES.values():
        assert any(fnmatch(f"page/{name}", pattern) for pattern in globs), name


def test_the_description_needs_no_network_and_has_the_route(server):
    document = server.client.get("/openapi.json").json()
    assert {"ImageRequest", "ImageForm", "ImageResponse"} <= set(document["components"]["schemas"])
    assert set(document["paths"]["/v1/image"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }
    assert not any(path in document["paths"] for path in PATHS)
    assert "cdn" not in server.client.get("/docs").text.lower() and json.dumps(document)
