"""`miss explain`: every operation is asked about, and the answer is what really runs."""

import importlib.util
import json

import pytest
import torch

from miss.cli import explain, run
from miss.kernels import evidence, registry
from miss.kernels.forcing import BACKWARD, Forced
from miss.kernels.records import Record
from miss.kernels.registry import OPS
from miss.kernels.shape_classes import shape_class, signature


def explained(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert run(["explain", "--device", "cpu", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_operation_is_explained(capsys):
    choices = explained(capsys)["ops"]
    registry.load_all()
    mine = {name for name, op in OPS.items() if op.impls[0].run.__module__.startswith("miss.")}
    if importlib.util.find_spec("bitsandbytes") is None:
        mine -= {"quant_linear_nf4", "quant_linear_llm_int8"}
    assert {c["op"] for c in choices} >= {name for name in mine if not name.endswith(BACKWARD)}
    assert all(c["runs"] == next(row["name"] for row in c["candidates"] if row["reason"] is None) for c in choices)
    assert {c["runs"] for c in choices} <= {"cpu", "torch", "composed", "bitsandbytes"}
    assert all(c["candidates"][-1] == {"name": "reference", "reason": None} for c in choices)


def test_float64_and_one_operation(capsys):
    (choice,) = explained(capsys, "--op", "layer_norm", "--dtype", "float64")["ops"]
    assert choice["inputs"][0] == {"shape": [2, 257, 384], "dtype": "float64", "device": "cpu"}
    assert choice["gradient"] == "autograd"


def test_forced_implementations_are_shown(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_forced", Forced(OPS, "quant_linear=reference"))
    result = explained(capsys, "--op", "quant_linear")
    assert result["forced"] == {"quant_linear": "reference"}
    assert [c["op"] for c in result["ops"]] == ["quant_linear", "quant_linear_backward"]
    for choice in result["ops"]:
        assert choice["runs"] == "reference"
        assert {"name": "torch", "reason": "not asked for: reference is forced"} in choice["candidates"]


def test_what_cannot_run_is_said(capsys, monkeypatch):
    registry.load_all()
    torch_row = next(impl for impl in OPS["layer_norm"].impls if impl.name == "torch")
    monkeypatch.setattr(registry, "_forced", Forced(OPS, "layer_norm=torch"))
    monkeypatch.setitem(torch_row.__dict__, "limits", lambda *_: "needs a miracle")
    assert run(["explain", "--device", "cpu", "--op", "layer_norm"]) == 0
    out = capsys.readouterr().out
    assert "needs a miracle" in out and "not asked for: torch is forced" in out and "nothing can run" in out


@pytest.mark.parametrize(
    ("environment", "flags", "says"),
    [
        ("layer_nrm=torch", [], "MISS_KERNELS: no operation named layer_nrm (did you mean layer_norm?)"),
        ("", ["--op", "gelu_mpl"], "did you mean gelu_mlp?"),
    ],
)
def test_wrong_names_exit_in_one_line(capsys, monkeypatch, environment, flags, says):
    monkeypatch.setattr(registry, "_forced", Forced(OPS, environment))
    assert run(["explain", *flags]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_without_cuda_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(explain.torch.cuda, "is_available", lambda: False)
    assert run(["explain", "--device", "cuda"]) == 1
    assert "use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "NVIDIA H100 80GB HBM3"])
def test_a_gpu_that_is_not_here(capsys, monkeypatch, tmp_path, device):
    monkeypatch.setenv("MISS_EVIDENCE", str(tmp_path / "none.json"))
    monkeypatch.setattr(evidence, "COMMITTED", tmp_path / "none.json")
    evidence.forget()
    assert run(["explain", "--device", device, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["here"] is False and result["device"].endswith(device if device.startswith("sm_") else f"({device})")
    assert {i["dtype"] for c in result["ops"] for i in c["inputs"]} >= {"bfloat16"}
    rows = {row["name"]: row for c in result["ops"] for row in c["candidates"] if c["op"] == "contrastive"}
    assert rows["triton"]["reason"] in (
        f"unvalidated: never run on {result['device']}",
        "needs the package triton, which is not installed",
    )
    assert not {c["runs"] for c in result["ops"]} & {"cpu", "triton"}
    asked = {c["op"] for c in result["ops"]}
    assert {"decoder_step", "decode_attention", "kv_append"} <= asked  # what a composed row calls is asked, too
    cpu_rows = [row for c in result["ops"] for row in c["candidates"] if row["name"] == "cpu"]
    assert cpu_rows and all(row["reason"] == "needs a cpu tensor, got cuda" for row in cpu_rows)


def test_the_evidence_is_shown(capsys, monkeypatch, tmp_path):
    """A record for exactly what `miss explain` asks: the row runs, on that GPU alone."""
    pytest.importorskip("triton")
    monkeypatch.setenv("MISS_EVIDENCE", str(tmp_path / "own.json"))
    monkeypatch.setattr(evidence, "COMMITTED", tmp_path / "none.json")
    evidence.forget()
    flags = ["explain", "--op", "hard_negatives", "--device"]
    assert run([*flags, "sm_90"]) == 0
    assert "asked of a GPU that is not used here" in capsys.readouterr().out
    seen = []
    registry.load_all()
    small, cpu = explain.MissConfig.preset("small"), torch.device("cpu")
    table = explain.calls(explain.Shapes(small, torch.bfloat16, cpu, laid_out=False))
    with registry.watch(lambda op, args, _: seen.append(shape_class(op.name, signature(args)))):
        table["hard_negatives"]()
    record = Record(
        op="hard_negatives",
        implementation="triton",
        gpu="NVIDIA H200",
        architecture="sm_90",
        shape_class=seen[0],
        sources=evidence.sources_hash(("contrastive.triton_impl",)),
        launches={},
        correct=True,
        error=0.0,
        plain_error=0.0,
        candidate="torch",
        speedup=1.5,
        microseconds=8.0,
        failure=None,
        versions={},
        date="2026-11-24T10:15:00Z",
    )
    evidence.write(tmp_path / "own.json", [record])
    assert run([*flags, "NVIDIA H200"]) == 0
    assert "runs: 1.50x of torch, error 0.0e+00" in capsys.readouterr().out
    assert run([*flags, "sm_90"]) == 0
    assert "NVIDIA H200, 2026-11-24" in capsys.readouterr().out
    assert run([*flags, "NVIDIA H100 PCIe"]) == 0
    assert "unvalidated: never run on sm_90 (NVIDIA H100 PCIe)" in capsys.readouterr().out
    evidence.forget()


def test_an_unknown_gpu_is_an_error_that_lists_the_known(capsys):
    assert run(["explain", "--device", "tpu"]) == 1
    error = capsys.readouterr().err
    assert "say its architecture (sm_90)" in error and error.count("\n") == 1
