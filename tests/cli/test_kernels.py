"""`miss kernels list`: every table, what runs here and why not the others."""

import json

import pytest
import torch

from miss.cli import run
from miss.kernels import extension, registry
from miss.kernels.forcing import Forced
from miss.kernels.registry import OPS, Impl, Op


@pytest.fixture
def toy():
    """An operation whose first row takes float32 alone, and not every shape."""
    name = "toy_of_test_kernels"
    yield Op(
        name,
        Impl(
            "cpu",
            lambda a: a,
            device="cpu",
            dtypes=frozenset({torch.float32}),
            needs=extension.missing,
            limits=lambda a: "too short" if len(a) < 2 else None,
        ),
        Impl("torch", lambda a: a),
        Impl("reference", lambda a: a),
    )
    del OPS[name]


def listed(capsys, *flags: str) -> dict:
    assert run(["kernels", "list", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_table_is_listed(capsys):
    result = listed(capsys)
    assert [op["op"] for op in result["ops"]] == list(OPS)
    assert result["cpu_kernels"]["isa"] == extension.isa()
    for op in result["ops"]:
        table = OPS[op["op"]]
        assert [row["name"] for row in op["implementations"]] == table.names
        for dtype in ("float32", "bfloat16"):
            rows = [row["here"][dtype] for row in op["implementations"]]
            first = next((row for row in rows if row["first"]), None)
            if first is None:  # averages are never bfloat16
                assert op["op"] == "ema" and dtype == "bfloat16" and all(row["reason"] for row in rows)
            else:
                assert first["runs"] and first["reason"] is None
        for row in op["implementations"]:
            assert row["name"] != "cpu" or row["compiled_for"] == extension.report().built


@pytest.mark.skipif(extension.isa() is None, reason=str(extension.missing()))
def test_a_row_of_ours_with_limits(capsys, toy):
    assert run(["kernels", "list", "--op", toy.name]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith(f"CPU kernels: {extension.isa()} in use")
    assert lines[-4:] == [
        toy.name,
        f"cpu float32: runs ({extension.isa()}, shapes permitting); bfloat16: does not take bfloat16",
        "torch float32: runs where the one above refuses a shape; bfloat16: runs",
        "reference fits, but stands below",
    ]


def test_what_is_forced_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_forced", Forced(OPS, "layer_norm=reference"))
    result = listed(capsys, "--op", "layer_norm")
    assert result["forced"] == {"layer_norm": "reference"}
    rows = {row["name"]: row["here"]["float32"] for row in result["ops"][0]["implementations"]}
    assert rows["torch"] == {"reason": "not asked for: reference is forced", "runs": False, "first": False}
    assert rows["reference"] == {"reason": None, "runs": True, "first": True}


def test_where_nothing_of_ours_runs_it_says_how_to_build(capsys, monkeypatch, toy):
    reason = "the CPU kernels are not built (`miss doctor` says how)"
    monkeypatch.setattr(extension, "report", lambda: extension.Report("", [], [], [], None, reason))
    assert run(["kernels", "list", "--op", toy.name]) == 0
    out = capsys.readouterr().out
    assert f"none of ours run: {reason}" in out and "to build them: install a C++17 compiler" in out


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [(["--op", "layer_nrm"], 1, "did you mean layer_norm?"), (["--device", "tpu"], 2, "tpu")],
)
def test_wrong_flags(capsys, flags, code, says):
    try:
        got = run(["kernels", "list", *flags])
    except SystemExit as stop:  # tyro's own
        got = stop.code
    assert got == code
    captured = capsys.readouterr()
    assert says in captured.err + captured.out


def test_without_cuda_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["kernels", "list", "--device", "cuda"]) == 1
    assert "use --device cpu" in capsys.readouterr().err
