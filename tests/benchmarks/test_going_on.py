"""Runs of many cases under faults: a case that kills its process, loses its device, hangs, or comes too late is said to
have, and the next process goes on behind it. The faults are planted in a bench of tiny cases; a lost device is played:
no CUDA context was ever lost here."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miss.benchmarks import going_on, harness, record, suite
from miss.benchmarks.cases import Case, Result, Settings
from miss.benchmarks.gpu import collect, jobs, work
from miss.benchmarks.gpu.jobs import Board, Job
from tests.benchmarks.test_gpu_suite import plan_of
from tests.benchmarks.test_harness import CPU, FixedCeilings, case

ENVIRONMENT = {"device": "cpu", "processor": "toy", "torch": "0", "miss": "0"}


def run(cases: list[Case], earlier: Result | None = None, seen=lambda *_: None, **settings) -> Result:
    both = [(one, cache) for one in cases for cache in one.caches]
    return suite.run(both, Settings(CPU, 1, **settings), FixedCeilings(CPU), iter, seen, earlier)


def how(total: Result) -> dict[str, str]:
    return {entry["shape"]: entry["how"] for entry in total.cases}


def named(*names: str) -> list[Case]:
    return [case(shape=name) for name in names]


def through_a_file(total: Result, path: Path, cases: list[Case]) -> Result:
    record.write(path, record.summary(ENVIRONMENT, {}, total))
    return record.earlier([path.with_name("never"), path], cases, ENVIRONMENT)


def test_what_time_cut_off_is_measured_by_the_next_run_and_nothing_twice(tmp_path):
    cases, seen = named("a", "b", "c"), []
    first = run(cases[:1])
    first = run(cases, first, deadline=0.0)
    assert how(first) == {"a": "done"} and [s["shape"] for s in first.skipped if s["reason"] == going_on.LATE] == [
        "b",
        "c",
    ]
    earlier = through_a_file(first, tmp_path / "kernels-cpu.jsonl", cases)
    rows = [row for row in earlier.rows if row.shape == "a"]
    assert rows == first.rows
    second = run(cases, earlier, seen=lambda one, *_: seen.append(one.shape))
    assert seen == ["b", "c"] and set(how(second).values()) == {"done"}
    assert {row.shape for row in second.rows} == {"a", "b", "c"} and [r for r in second.rows if r.shape == "a"] == rows
    assert not [s for s in second.skipped if s["reason"] == going_on.LATE]


def test_files_of_another_machine_are_refused(tmp_path):
    path = tmp_path / "kernels-cpu.jsonl"
    record.write(path, record.summary(ENVIRONMENT | {"torch": "1"}, {}, run(named("a"))))
    with pytest.raises(ValueError, match="another machine or version"):
        record.earlier([path], named("a"), ENVIRONMENT)


@pytest.mark.parametrize("where", ["check", "time"])
def test_a_device_that_is_lost_names_who_lost_it_and_what_follows_is_not_refused(monkeypatch, where):
    """Ours, or a peer, while it is checked or timed; the cases behind it are for the next process."""
    state = {"sound": True, "calls": 0}

    def breaks(x, weight, bias):
        state["calls"] += 1
        if where == "check" or state["calls"] > 2:
            state["sound"] = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    for module in (harness, suite):
        monkeypatch.setattr(module, "sound", lambda device: state["sound"])
    bad = case(shape="bad", peers=(harness_peer("breaks", breaks),))
    total = run([*named("a"), bad, *named("b")])
    assert total.lost and how(total) == {"a": "done", "bad": "lost"}
    (refused,) = total.refused
    assert (refused["shape"], refused["implementation"], refused["ours"]) == ("bad", "breaks", False)
    assert "device was lost with it" in refused["reason"]
    state["sound"] = True
    rest = run([*named("a"), bad, *named("b")], replace(total, lost=False))
    assert not rest.lost and how(rest) == {"a": "done", "bad": "lost", "b": "done"} and rest.refused == [refused]


def harness_peer(name: str, function):
    from miss.benchmarks.cases import Peer

    return Peer(name, lambda *inputs: lambda: function(*inputs))


def test_a_case_that_is_ended_by_the_time_is_tried_once_more_and_then_given_up(tmp_path):
    def ended(*_):
        raise SystemExit(143)

    cases = [case(shape="slow", make=ended), *named("b")]
    path, kept = tmp_path / "kernels-cpu.jsonl", []
    for _ in range(2):
        earlier = record.earlier([path], cases, ENVIRONMENT)
        with pytest.raises(SystemExit):
            suite.run(
                [(one, "warm") for one in cases], Settings(CPU, 1), FixedCeilings(CPU), iter, lambda *_: None, earlier,
                lambda total: record.write(path, record.summary(ENVIRONMENT, {}, total)),
            )  # fmt: skip
    kept = run(cases, record.earlier([path], cases, ENVIRONMENT))
    assert how(kept) == {"slow": "died", "b": "done"} and "cut off by the time 2 times" in kept.refused[0]["reason"]


def test_each_implementation_has_the_limit_for_itself(monkeypatch):
    """Three that compile for 0.4 s each, say, are no case that hangs for 0.8; one that takes 1.2 is."""
    ended: list[int] = []
    monkeypatch.setattr(suite.os, "_exit", ended.append)

    def slow(seconds):
        waits = iter([seconds])

        def once(x, weight, bias):
            time.sleep(next(waits, 0.0))
            return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

        return once

    three = [case(shape="many", peers=tuple(harness_peer(str(i), slow(0.4)) for i in range(3)))]
    assert how(run(three, stall=0.8)) == {"many": "done"} and not ended
    run([case(shape="one", peers=(harness_peer("slow", slow(1.2)),))], stall=0.8)
    assert ended == [going_on.AGAIN]


# The command of a part, with faults in it: `miss bench kernels` itself, on cases of our making.
PLANTED = """
import os, sys, time
from miss.benchmarks import ceilings, harness, suite
from miss.cli import run
from tests.benchmarks.test_harness import case, FixedCeilings

def fails(how):
    def make(generator):
        print("at", how, flush=True)
        if how == "dies":
            os.abort()
        if how == "hangs":
            time.sleep(300)
        suite.sound = lambda device: False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return case(shape=how, make=make)

class Quick(FixedCeilings):
    record = lambda self: {"source": "toy"}

ceilings.Ceilings = Quick
cases = [case(shape="a"), fails("dies"), fails("loses"), case(shape="b"), fails("hangs"), case(shape="c")]
suite.select = lambda *_: [(one, "warm") for one in cases]
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ends processes by /proc")
def test_a_job_goes_on_behind_what_kills_it_loses_its_device_or_hangs(tmp_path):
    plan = plan_of(tmp_path, 100.0)
    out = plan.work / "bench" / "toy"
    words = ["bench", "kernels", "--no-plots", "--json", "--stall", "2", "--out", str(out)]
    resume = ("--go-on", str(plan.kernels), str(out / "kernels-cpu.jsonl"))
    job = Job("toy", lambda s: [sys.executable, "-c", PLANTED, *words], read=work._counted, fine=(1,), resume=resume)
    board = tmp_path / "board.json"
    assert jobs.run_all([job], plan, Board(board), "kernels") == []
    found = json.loads(board.read_text())["jobs"]["toy"]
    assert (found["status"], found["starts"]) == ("done", 4) and found["result"]["complete"]
    reasons = {text.split(": ")[0].split()[-1]: text for text in found["result"]["ours_refused"]}
    assert set(reasons) == {"dies", "loses", "hangs"} and "device was lost" in reasons["loses"]
    collect.pack_all(plan)
    lines = [json.loads(line) for line in plan.kernels.read_text().splitlines()]
    assert {line["shape"] for line in lines if line["record"] == "row"} == {"a", "b", "c"}
    log = (plan.logs / "kernels.toy.log").read_text()
    assert [log.count(f"at {name}\n") for name in ("dies", "loses", "hangs")] == [1, 1, 1]


def test_a_job_whose_cases_came_too_late_leaves_its_part_unfinished_and_goes_on(tmp_path):
    late = [{"reason": going_on.LATE}]
    code = f"import json, sys; late = [] if '--go-on' in sys.argv else {late}\n"
    code += "print(json.dumps({'rows': [], 'refused': [], 'skipped': late}))"
    job = Job("toy", lambda s: [sys.executable, "-c", code], read=work._counted, resume=("--go-on", "x"))
    board = tmp_path / "board.json"
    assert jobs.run_all([job], plan_of(tmp_path), Board(board), "toy") == []
    found = json.loads(board.read_text())
    assert not found["complete"] and found["jobs"]["toy"]["status"] == "partial"
    assert jobs.run_all([job], plan_of(tmp_path), Board(board), "toy") == []
    found = json.loads(board.read_text())
    assert found["complete"] and found["jobs"]["toy"]["status"] == "done"
