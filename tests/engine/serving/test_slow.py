"""Clients that send or read slowly: each is closed by its deadline, and who is not slow hardly notices."""

import json
import os
import statistics
import subprocess
import sys
import time

import pytest

from tests.engine.serving.harness import data_url, png, wait
from tests.engine.serving.started import ROOT, Process

DEADLINES = {"headers": 1.5, "body": 2.0, "reader": 2.0, "pipeline": 2.0}
FLAGS = ("--header-timeout", "1.5", "--body-timeout", "2", "--write-timeout", "2")
WORDS = "is there a an the in this image what which organ of left right lung liver".split()
LARGE = {
    "questions": ["which organ"] * 64,
    "alternatives": 15,
    "candidates": [w + "\u200b" * 480 for w in WORDS],
}  # 1.5 MB


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("slow"), folder, *FLAGS)
    yield process
    assert process.terminate() == 0


def start(server, clients, longest, tick=0.1, seconds=0.0):
    command = [sys.executable, "-m", "tests.engine.serving.slow"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    large = json.dumps({"image": data_url(png(3)), **LARGE})
    given = {"address": server.address, "clients": clients, "longest": longest, "large": large}
    given |= {"tick": tick, "seconds": seconds, "spread": 10.0}
    process.stdin.write(json.dumps(given) + "\n")
    process.stdin.flush()
    return process


def healthy(server, seconds):
    """Seconds of each question, asked one after another for so long."""
    image, took, end = png(1), [], time.monotonic() + seconds
    while time.monotonic() < end:
        took.append(server.took(image))
    return took


def high(took, share=0.99):
    return sorted(took)[min(len(took) - 1, int(share * len(took)))]


@pytest.mark.parametrize("kind", DEADLINES)
def test_slow_clients_are_closed_by_their_deadline(served, kind):
    served.took(png(1))
    before = served.descriptors()
    process = start(served, {kind: 3 if kind == "reader" else 50}, 10)
    took = healthy(served, 1.5)
    (closed,) = json.loads(process.communicate(timeout=30)[0]).values()
    assert all(seconds is not None and seconds < DEADLINES[kind] + 5 for seconds in closed), closed
    assert min(closed) > DEADLINES[kind] * 0.8, "closed before their time was over"
    assert statistics.median(took) < 1
    wait(lambda: abs(served.descriptors() - before) <= 2, 5, "their descriptors' being free")
    wait(served.idle)
    served.law()


@pytest.fixture(scope="module")
def patient(folder, tmp_path_factory):
    """With deadlines of 10 s."""
    flags = ("--header-timeout", "10", "--body-timeout", "10", "--write-timeout", "10")
    process = Process(tmp_path_factory.mktemp("patient"), folder, *flags)
    yield process
    assert process.terminate() == 0


@pytest.mark.soak
def test_a_thousand_slow_clients_cost_the_others_little(patient):
    """For MISS_SLOW_SECONDS (60), each a byte a second; p99 of healthy ones before, beside and after."""
    seconds = float(os.environ.get("MISS_SLOW_SECONDS", 60))
    healthy(patient, 2)
    without = healthy(patient, 10)
    process = start(patient, {"headers": 450, "body": 450, "pipeline": 100}, 20, tick=1.0, seconds=seconds)
    time.sleep(2.0)
    beside = healthy(patient, seconds - 2)
    closed = json.loads(process.communicate(timeout=60)[0])
    wait(patient.idle)
    without += healthy(patient, 10)
    told = {"p50": [statistics.median(without), statistics.median(beside)], "p99": [high(without), high(beside)]}
    told = {name: [round(1000 * one, 2) for one in both] for name, both in told.items()}
    told |= {"num": [len(without), len(beside)], "closed": {kind: len(took) for kind, took in closed.items()}}
    print(
        json.dumps({**told, "latest": {kind: max(took, key=lambda one: one or 1e9) for kind, took in closed.items()}})
    )
    assert all(None not in took and max(took) < 13 for took in closed.values())
    patient.law()
    assert high(beside) <= 1.5 * high(without), told
