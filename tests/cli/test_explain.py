"""`miss explain`: every operation is asked about, and the answer is what really runs."""

import importlib.util
import json

import pytest

from miss.cli import explain, run
from miss.kernels import registry
from miss.kernels.registry import BACKWARD, OPS, Forced


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
    monkeypatch.setattr(registry, "_forced", Forced("quant_linear=reference"))
    result = explained(capsys, "--op", "quant_linear")
    assert result["forced"] == {"quant_linear": "reference"}
    assert [c["op"] for c in result["ops"]] == ["quant_linear", "quant_linear_backward"]
    for choice in result["ops"]:
        assert choice["runs"] == "reference"
        assert {"name": "torch", "reason": "not asked for: reference is forced"} in choice["candidates"]


def test_what_cannot_run_is_said(capsys, monkeypatch):
    registry.load_all()
    torch_row = next(impl for impl in OPS["layer_norm"].impls if impl.name == "torch")
    monkeypatch.setattr(registry, "_forced", Forced("layer_norm=torch"))
    monkeypatch.setattr(OPS["layer_norm"], "why_not", lambda impl, *_: "needs a miracle" if impl is torch_row else None)
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
    monkeypatch.setattr(registry, "_forced", Forced(environment))
    assert run(["explain", *flags]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_without_cuda_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(explain.torch.cuda, "is_available", lambda: False)
    assert run(["explain", "--device", "cuda"]) == 1
    assert "use --device cpu" in capsys.readouterr().err
