"""`miss bench`: what it prints and writes, and when it fails."""

import json

import pytest

from miss.benchmarks.ceilings import Ceilings
from miss.cli import run


@pytest.fixture(autouse=True)
def few_bursts(monkeypatch):
    whole = Ceilings.record
    monkeypatch.setattr(Ceilings, "record", lambda self, repeats=1: whole(self, 1))


def bench(*flags: str) -> int:
    return run(["bench", "kernels", "--op", "gelu_mlp", "--shapes", "1,3,64,32", "--repeats", "2", *flags])


def test_kernels_prints_a_table_and_one_object_last(tmp_path, capsys):
    assert bench("--dtype", "float32", "--out", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [r["op"] for r in found["rows"]] == ["gelu_mlp"] * len(found["rows"]) and found["rows"]
    assert {r["implementation"] for r in found["rows"]} >= {"torch"}
    assert found["environment"]["before"]["load"] and found["ceilings"]["after"]
    table = [line for line in lines[:-1] if str(tmp_path) not in line]
    assert max(map(len, table)) <= 120 and any(line.startswith("gelu_mlp  custom M=3 N=64 K=32") for line in lines)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"kernels-cpu.jsonl", "roofline-cpu.png", "gelu_mlp-cpu.png"}
    records = [json.loads(line)["record"] for line in (tmp_path / "kernels-cpu.jsonl").read_text().splitlines()]
    assert records[:2] == ["environment", "ceilings"] and records.count("row") == len(found["rows"])


def test_json_is_all_that_stdout_has(capsys):
    assert bench("--dtype", "float32", "bfloat16", "--json") == 0
    out = capsys.readouterr().out
    assert {r["dtype"] for r in json.loads(out)["rows"]} == {"float32", "bfloat16"} and out.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--op", "gelu"], "no benchmark of gelu"),
        (["--dtype", "int3"], "accepted: float32"),
        (["--shapes", "1,2,3"], "four numbers"),
        (["--shapes", "huge"], "no preset named 'huge'"),
        (["--repeats", "0"], "at least 1"),
        (["--op", "layer_norm"], "none of these"),  # it has no case of one linear
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, says, capsys):
    assert bench(*flags) == 1
    assert says in capsys.readouterr().err


def test_compare_sees_an_injected_regression(tmp_path, capsys):
    assert bench("--dtype", "float32", "--out", str(tmp_path / "a")) == 0
    path = tmp_path / "a" / "kernels-cpu.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"ours": True, "spread": 0.01, "repeats": 20} if line["record"] == "row" else {}
    path.write_text("\n".join(map(json.dumps, lines)))
    slow = tmp_path / "b.jsonl"
    slow.write_text("\n".join(json.dumps(line | {"median_ms": 1.3 * line.get("median_ms", 0)}) for line in lines))
    capsys.readouterr()
    assert run(["bench", "compare", str(path), str(path)]) == 0
    assert "nothing changed" in capsys.readouterr().out
    assert run(["bench", "compare", str(tmp_path / "a"), str(slow)]) == 1
    assert "regression" in capsys.readouterr().out
    assert run(["bench", "compare", str(path), str(slow), "--limit", "40"]) == 0
    assert run(["bench", "compare", str(path), str(slow), "--limit", "25", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["regressions"]) > 0
    assert run(["bench", "compare", str(path), str(tmp_path / "none.jsonl")]) == 1
