"""What an answer's time went to: the parts are the whole, every run has its place, and costs are those of the runs."""

import json
import time

import pytest
import torch

from miss import Engine
from miss.cli import run
from miss.cli.profile import chrome_trace, share
from miss.engine.runtime.allocations import allocations
from miss.engine.runtime.profile import OUTSIDE, Part, profile
from miss.engine.runtime.sampler import SamplingParams
from miss.engine.runtime.stages import stage
from miss.kernels.kv_cache import kv_append
from miss.kernels.layer_norm import layer_norm
from miss.kernels.linear import linear

CPU = torch.device("cpu")
IMAGE, QUESTION = "examples/chest-xray.jpg", "what modality is this image?"


@pytest.fixture(scope="module")
def engine():
    return Engine.load("miss-small")


def ask(engine: Engine, cached: bool = False) -> None:
    if not cached:
        engine.forget_images()
    engine.answer(IMAGE, QUESTION, SamplingParams(num_alternatives=0))


@torch.no_grad()
def two_stages() -> None:
    x, ones, weight = torch.randn(6, 64), torch.ones(64), torch.randn(32, 64)
    with stage("first", CPU):
        layer_norm(x, ones, ones)
        time.sleep(0.004)
        with stage("within", CPU):
            linear(x, weight, None)
    layer_norm(x, ones, ones)
    time.sleep(0.002)


def test_every_run_stands_in_its_stage_and_gaps_have_no_operation():
    found = profile(two_stages, CPU, repeats=3)
    parts = {(p.stage, p.op): p for p in found.parts}
    assert set(parts) == {
        *(("first", "layer_norm"), ("first", ""), ("within", "linear"), ("within", "")),
        *((OUTSIDE, "layer_norm"), (OUTSIDE, "")),
    }
    assert parts["first", ""].seconds > 0.004 and parts[OUTSIDE, ""].seconds > 0.002
    assert parts["within", "linear"].flops == 2.0 * 6 * 64 * 32
    assert parts["within", "linear"].seconds < 0.004  # the sleep is not its


def test_parts_of_an_answer_add_up(engine):
    found = profile(lambda: ask(engine), CPU, repeats=5)
    assert [stage for stage in dict.fromkeys(p.stage for p in found.parts)] == [
        *("prepare", "image", "question", "decode"),
        OUTSIDE,
    ]
    once = profile(lambda: ask(engine), CPU, repeats=1)  # of several, medians of spans are not the median of the whole
    assert once.recorded == pytest.approx(once.seconds, rel=1e-6)
    assert all(p.seconds >= 0 for p in found.parts if p.op)
    image = sum(p.flops for p in found.parts if p.stage == "image")
    assert image > 5e9  # miss-small's ViT has 11 GFLOP
    assert {p.op for p in found.parts if p.stage == "image"} >= {"patch_embed", "attention", "linear"}


def test_a_cached_image_costs_no_encoding(engine):
    ask(engine)
    found = profile(lambda: ask(engine, cached=True), CPU, repeats=2)
    assert not [p.op for p in found.parts if p.stage == "image" and p.op]


def test_what_differs_between_passes_is_refused():
    calls = iter(range(100))

    @torch.no_grad()
    def call() -> None:
        for _ in range(next(calls)):
            layer_norm(torch.randn(2, 8), torch.ones(8), torch.ones(8))

    with pytest.raises(ValueError, match="the passes differ in what they run"):
        profile(call, CPU, repeats=2)


def test_a_failing_run_closes_its_span():
    def call() -> None:
        with stage("first", CPU), pytest.raises((ValueError, RuntimeError)):
            kv_append(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(3, 1, 4), torch.zeros(2, 1, 4),
                      torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))  # fmt: skip

    assert profile(call, CPU, repeats=1).parts[0].stage == "first"


def test_allocations_belong_to_the_run_that_asked():
    found = allocations(two_stages, CPU)
    assert found.parts["within", "linear"].nbytes >= 6 * 32 * 4
    assert found.peak >= 6 * 64 * 4


def test_shares_are_of_the_nearer_ceiling():
    ceilings = {"fp32": 100.0, "int8": 400.0, "read": 10.0}
    busy = Part("s", "linear", "cpu", seconds=2.0, flops=100.0, nbytes=1.0, kinds={"fp32": 100.0})
    moving = Part("s", "norm", "cpu", seconds=2.0, flops=1.0, nbytes=15.0, kinds={"fp32": 1.0})
    assert share(busy, ceilings) == (0.5, "fp32")
    assert share(moving, ceilings) == (0.75, "read")
    assert share(Part("s", "", "", seconds=1.0), ceilings) is None


def test_the_trace_nests_operations_in_stages():
    trace = chrome_trace(profile(two_stages, CPU, repeats=1))
    events = {(e["name"], e["cat"]): e for e in trace["traceEvents"] if e["ph"] == "X"}
    outer, inner = events["first", "first"], events["linear", "within"]
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert inner["args"]["flops"] == 2.0 * 6 * 64 * 32


def test_the_command(tmp_path, capsys):
    trace = tmp_path / "answer.json"
    assert run(["profile", "answer", "--repeats", "1", "--cached", "--json", "--trace", str(trace)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"question", "decode"} <= {part["stage"] for part in record["parts"]}
    assert sum(part["share"] for part in record["parts"]) == pytest.approx(1)
    assert json.loads(trace.read_text())["traceEvents"]
    assert run(["profile", "answer", "--repeats", "0"]) == 1
