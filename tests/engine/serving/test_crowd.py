"""Thousands of connections at once: a terminal answer each, to the one who asked, in bounded memory."""

import json
import resource
import statistics
import subprocess
import sys
import time

import pytest

from tests.engine.serving.harness import data_url, png, wait
from tests.engine.serving.started import ROOT, Process

QUESTIONS = ("is there a mass?", "which organ", "ct", "left lung?")
MIB = 1 << 20


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("crowd"), folder)
    yield process
    assert process.terminate() == 0


def known(server):
    """(body, answer) of many questions about many images, asked one by one."""
    found = []
    for seed in range(8):
        for question in QUESTIONS:
            body = {"image": data_url(png(seed)), "question": question}
            told = server.client.post("/v1/vqa", json=body).json()["answers"][0]["answer"]
            found.append((json.dumps(body), told))
    assert len({told for _, told in found}) > 8, "answers that are all alike would hide a mix-up"
    return found


def crowd(server, count, clients):
    """All open, then all ask -> what they were told, added up."""
    command = [sys.executable, "-m", "tests.engine.serving.crowd"]
    asked, share, running = known(server), count // clients, []
    for number in range(clients):
        given = {"asked": asked, "address": server.address, "source": f"127.0.0.{2 + number}"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        process.stdin.write(json.dumps({**given, "first": number * share, "count": share}) + "\n")
        process.stdin.flush()
        running.append(process)
    assert [process.stdout.readline() for process in running] == ["ready\n"] * clients
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    peak = {}
    while any(process.poll() is None for process in running):
        peak = {part: max(size, peak.get(part, 0)) for part, size in server.memory().items()}
        time.sleep(0.2)
    told = [json.loads(process.stdout.read()) for process in running]
    statuses = {}
    for one in told:
        for status, number in one["statuses"].items():
            statuses[int(status)] = statuses.get(int(status), 0) + number
    return statuses, [what for one in told for what in one["wrong"]], max(one["seconds"] for one in told), peak


def back(server, before, seconds=5.0):
    """How long until a question takes what it took before."""
    start = time.monotonic()
    while (now := statistics.median(server.took(png(1)) for _ in range(5))) > 2 * before + 0.02:
        assert time.monotonic() - start < seconds, f"p50 {now:.4f} s, before {before:.4f} s"
    return time.monotonic() - start


def crowded(server, count, clients, growth):
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most < count + 500:
        pytest.skip(f"a process may have {most} descriptors here; wanted {count + 500}")
    before, memory = statistics.median(server.took(png(1)) for _ in range(15)), server.memory()
    statuses, wrong, seconds, peak = crowd(server, count, clients)
    took = back(server, before)
    wait(server.idle, 10, "all gauges' being 0")
    server.law()
    grown = {part: (peak[part] - memory[part]) / MIB for part in peak}
    told = {"statuses": statuses, "seconds": round(seconds, 2), "p50_before": round(before, 4)}
    told |= {"back_seconds": round(took, 2), "grown_mib": {part: round(size, 1) for part, size in grown.items()}}
    print(json.dumps(told))
    assert not wrong, wrong[:5]
    assert sum(statuses.values()) == count and set(statuses) <= {200, 429}, statuses
    assert statuses[200] >= 500, statuses
    assert sum(grown.values()) < growth, grown


def test_two_thousand_connections_at_once(served):
    crowded(served, 2_000, 2, 250)


@pytest.mark.soak
def test_ten_thousand_connections_at_once(served):
    crowded(served, 10_000, 4, 600)
