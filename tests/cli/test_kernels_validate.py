"""`miss kernels validate`: the command on the CPU's kernels, and what becomes of a measuring process that dies."""

import dataclasses
import json
import os
import time

import pytest
import torch

from miss.cli import kernels_validate, run
from miss.cli.kernels_validate import Found, Plan, measured, work
from miss.kernels import extension
from miss.kernels.records import Record, read
from miss.kernels.validation import QUICK, WHOLE

PLAN = Plan(("kv_append",), ("small",), ("float32",), (2,), "cpu", QUICK, deadline=float("inf"))
BLANK = Record(
    op="toy",
    implementation="triton",
    gpu="NVIDIA H200",
    architecture="sm_90",
    shape_class="float32[4]",
    sources="0" * 16,
    launches={},
    correct=False,
    error=None,
    plain_error=None,
    candidate="torch",
    speedup=None,
    microseconds=None,
    failure=None,
    versions={},
    date="2026-11-24T10:15:00Z",
)
GOOD = dataclasses.replace(BLANK, correct=True, error=0.0, plain_error=0.0, speedup=2.0)
built = pytest.mark.skipif(extension.isa() is None, reason=str(extension.missing()))


def outcome(worker, stall: float = 60.0) -> tuple[list[Record], Found]:
    found = Found()
    return list(measured(PLAN, set(), found, worker, stall)), found


def dies_once(there, plan, done):
    """At its first start it dies of a kernel; started again, it knows what not to touch."""
    if not done:
        there.send(("begin", GOOD))
        there.send(("done", GOOD))
        there.send(("begin", dataclasses.replace(BLANK, shape_class="float32[8]")))
        os._exit(139)
    assert {key[4] for key in done} == {"float32[4]", "float32[8]"}
    there.send(("end", "complete"))


def the_first_call_hangs(there, plan, done):
    """The real process, with a call before its own that never returns."""
    right = kernels_validate._calls

    def planted(plan):
        yield "kv_append", "planted", lambda: time.sleep(600)
        yield from right(plan)

    kernels_validate._calls = planted
    work(there, plan, done)


def loses_the_device(there, plan, done):
    if not done:
        there.send(("begin", GOOD))
        there.send(("done", dataclasses.replace(BLANK, failure="illegal access")))
        there.send(("call", dataclasses.replace(BLANK, implementation=WHOLE, shape_class="small")))
        there.send(("lost", "CUDA error: an illegal memory access"))
        there.send(("end", "again"))
    else:
        assert {key[1] for key in done} == {"triton", WHOLE}
        there.send(("end", "complete"))


def goes_round(there, plan, done):
    there.send(("begin", BLANK))
    there.send(("skip", "of the candidate"))
    there.send(("end", "again"))


def compiles_long(there, plan, done):
    """One kernel beyond any measurement's limit, one beyond its own."""
    if not done:
        there.send(("begin", BLANK))
        there.send(("compiling", None))
        time.sleep(2.5)
        there.send(("compiled", None))
        there.send(("done", GOOD))
        there.send(("begin", dataclasses.replace(BLANK, shape_class="float32[8]")))
        there.send(("compiling", None))
        time.sleep(600)
    assert {key[4] for key in done} == {"float32[4]", "float32[8]"}
    there.send(("end", "complete"))


def dies_between(there, plan, done):
    os._exit(1)


def test_a_kernel_that_kills_its_process_is_recorded_and_the_rest_goes_on():
    records, found = outcome(dies_once)
    assert [r.failure for r in records] == [None, "its process died (exit code 139)"]
    assert records[1].shape_class == "float32[8]" and found.complete


@built
def test_a_call_that_hangs_is_recorded_as_that_and_the_rest_is_measured():
    (hung, *behind_it), found = outcome(the_first_call_hangs, stall=2.0)
    assert (hung.op, hung.implementation, hung.failure) == (
        "kv_append", WHOLE, "its process hung: nothing was said for 2 s",
    )  # fmt: skip
    assert hung.shape_class == "planted" and behind_it and all(r.correct for r in behind_it) and found.complete


def test_a_compilation_has_a_limit_of_its_own_and_is_no_finding():
    found = Found()
    (record,) = measured(PLAN, set(), found, compiles_long, 1.0, 5.0)
    assert record == GOOD and not found.complete, "the next run tries the other one again"
    assert found.skipped == ["toy triton float32[8]: it compiled for 5 s; the next run tries it again"]
    for minutes in (0.1, 1.7, 10.0, 60.0):
        limit = kernels_validate._compiling_limit(minutes)
        assert kernels_validate._stall(minutes) <= limit <= max(kernels_validate._stall(minutes), 30 * minutes)


def test_a_device_that_is_lost_is_recorded_and_the_next_process_goes_on_behind_it():
    records, found = outcome(loses_the_device)
    assert [r.failure for r in records] == [
        "illegal access", "the device was lost with it: CUDA error: an illegal memory access",
    ]  # fmt: skip
    assert found.complete


def test_a_process_that_dies_of_something_else_or_goes_round_is_an_error():
    with pytest.raises(OSError, match="died between two measurements"):
        outcome(dies_between)
    with pytest.raises(OSError, match="nothing can be said of what it was at"):
        outcome(goes_round)


def test_what_is_cut_off_by_the_time_is_not_said_to_hang():
    start, found = time.time(), Found()
    plan = dataclasses.replace(PLAN, deadline=start + 1.0, grace=0.5)
    assert list(measured(plan, set(), found, the_first_call_hangs, 60.0)) == []
    assert not found.complete and time.time() - start < 6.0


@pytest.mark.parametrize("minutes", [0.1, 0.5, 1.8, 10.0, 60.0])
def test_what_hangs_is_found_within_the_time(minutes):
    stall = kernels_validate._stall(minutes)
    assert stall <= max(1.0, 30 * minutes) and stall <= 120.0 and (minutes < 1.8 or stall >= 30.0)


class Said(list):
    send = list.append


@built
def test_the_time_that_is_over_ends_it():
    said = Said()
    work(said, dataclasses.replace(PLAN, deadline=0.0), frozenset())
    assert said == [("end", "over")]


@built
def test_what_is_known_is_not_measured_again():
    said = Said()
    work(said, PLAN, frozenset())
    records = [value for kind, value in said if kind == "done"]
    assert records and said[-1] == ("end", "complete")
    assert [kind for kind, _ in said[:-1] if kind != "call"] == ["begin", "done"] * len(records)
    again = Said()
    work(again, PLAN, frozenset((*r.key, r.sources) for r in records))
    assert {kind for kind, _ in again[:-1]} == {"call"} and again[-1] == ("end", "complete")


@built
@pytest.mark.parametrize("where", ["gather", "measure"])
def test_a_device_that_is_lost_where_no_kernel_of_ours_is_judged_is_noticed(monkeypatch, where):
    """An error of the rows that run by themselves, or of those that ours is held against."""
    state = {"sound": True}

    def planted(*args):
        state["sound"] = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels_validate, where, planted)
    monkeypatch.setattr(kernels_validate, "sound", lambda device: state["sound"])
    said = Said()
    work(said, PLAN, frozenset())
    begun = ["call"] if where == "gather" else ["call", "begin"]
    assert [kind for kind, _ in said] == [*begun, "lost", "end"] and said[-1] == ("end", "again")
    judged = said[-3][1]  # what the one who listens records as failed
    again = Said()
    work(again, PLAN, frozenset([(*judged.key, judged.sources)]))
    assert judged.key not in [value.key for kind, value in again if kind in ("call", "begin")]


@built
def test_the_command_on_the_cpu(capsys, tmp_path, monkeypatch):
    own = tmp_path / "own.json"
    monkeypatch.setenv("MISS_EVIDENCE", str(own))
    out = tmp_path / "trial.json"
    flags = ["--device", "cpu", "--quick", "--op", "kv_append", "attention_varlen", "--out", str(out)]
    assert run(["kernels", "validate", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["complete"] and result["file"] == str(out) and not result["skipped"]
    assert {r["op"] for r in result["records"]} == {"kv_append", "attention_varlen", "attention_varlen_backward"}
    assert all(r["gpu"] == "cpu" and r["correct"] for r in result["records"])
    assert {r.key for r in read(out)} == {Record(**r).key for r in result["records"]}
    assert not own.exists()  # a trial is no evidence
    assert run(["kernels", "validate", *flags]) == 0
    assert "0 measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "sees no CUDA device"),
        (["--device", "cpu", "--op", "kv_apend"], "did you mean kv_append?"),
    ],
)
def test_what_cannot_be_measured_exits_in_one_line(capsys, monkeypatch, flags, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if extension.isa() is None:
        pytest.skip(str(extension.missing()))
    assert run(["kernels", "validate", *flags]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_file_that_cannot_be_read_ends_it_at_once(capsys, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    assert run(["kernels", "validate", "--device", "cpu", "--quick", "--out", str(tmp_path / "bad.json")]) == 1
    assert "bad.json: not JSON" in capsys.readouterr().err
