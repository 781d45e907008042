"""Images that are broken on purpose, by the thousand: a fixed word each, within a second, in memory that stays flat."""

import json
import random
import time

import pytest

from tests.engine.serving.broken import corpus
from tests.engine.serving.harness import checked, wait
from tests.engine.serving.started import Process

MIB = 1 << 20
LEAST = {"answered", "image_truncated", "image_corrupt", "image_not_an_image", "image_too_many_pixels",
         "image_unsupported_format"}  # fmt: skip


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("malformed"), folder)
    yield process
    assert process.terminate() == 0


def throw(server, images):
    """Asks about each -> the slowest one's seconds and name, and how often each word came."""
    slowest, words = (0.0, ""), {}
    for name, data in images:
        start = time.monotonic()
        files = {"image": (f"canary-{name}", data)}
        response = server.client.post("/v1/vqa", files=files, data={"question": "is there a mass canary"})
        slowest = max(slowest, (round(time.monotonic() - start, 3), name))
        assert response.status_code in (200, 422), (name, response.text)
        word = "answered"
        if response.status_code == 422:
            checked(response, 422)
            assert "canary" not in response.text, name
            word = response.json()["error"]["code"]
        words[word] = words.get(word, 0) + 1
    return slowest, words


def thrown(server, images, limit, growth):
    """limit: seconds of one; growth: MiB of all processes after the first hundred, which load what is loaded once."""
    first, warm = throw(server, images[:100])
    before = server.memory()
    slowest, words = throw(server, images[100:])
    slowest = max(first, slowest)
    wait(server.idle)
    server.law()
    grown = {part: round((size - before[part]) / MIB, 1) for part, size in server.memory().items()}
    for word, number in warm.items():
        words[word] = words.get(word, 0) + number
    print(json.dumps({"images": len(images), "slowest": slowest, "grown_mib": grown, "words": words}))
    assert slowest[0] < limit, slowest
    assert sum(grown.values()) < growth, grown
    assert words.keys() >= LEAST, words
    assert "died" not in str(server.metrics()), "a decoder ended"


def test_a_sample_of_malformed_images(served):
    images = list(corpus(seed=11))
    random.Random(1).shuffle(images)
    special = [
        entry for entry in images if entry[0].startswith(("giant", "wide", "tall", "text-bomb", "bomb", "longer"))
    ]
    thrown(served, special + images[: 260 - len(special)], 3, 64)  # a second, where nothing else wants the machine


@pytest.mark.soak
def test_thousands_of_malformed_images(served):
    images = list(corpus())
    assert len(images) >= 2000
    random.Random(2).shuffle(images)
    thrown(served, images, 1, 64)
