"""`miss bench pretrain` end to end, small: both steps start from one loss, and the figures are there."""

import json

import pytest

from miss.benchmarks import bench_pretrain
from miss.cli.bench import PretrainArgs, pretrain


def test_both_run_and_agree(capsys, tmp_path):
    assert pretrain(PretrainArgs(quick=True, precision=("fp32",), json=True, out=tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert len(lines) == 1 and found == json.loads((tmp_path / "pretrain-small-2x28.json").read_text())
    assert set(found["rows"]) == {"ours fp32", "original fp32"} and found["ratios"]["original fp32 / ours fp32"] > 0
    ours, theirs = found["rows"]["ours fp32"], found["rows"]["original fp32"]
    made = found["gflop_per_step"]
    assert made["original"] > made["ours"] > 1 and found["flops_ratio"] > 1.2
    ceiling = max(found["ceiling_gflops"]["fp32"].values())
    for row, own in ((ours, made["ours"]), (theirs, made["original"])):
        assert row["gflops_per_s"] == pytest.approx(own / row["s_per_step"], rel=0.02)
        assert row["made"] == pytest.approx(own / row["s_per_step"] / ceiling, abs=2e-3)
        assert row["mfu"] == pytest.approx(made["ours"] / row["s_per_step"] / ceiling, abs=2e-3)
    assert ours["mfu"] == ours["made"] and theirs["mfu"] < theirs["made"] and "load" in found["environment"]["after"]


def test_other_work_is_refused_and_nonsense_said():
    options = bench_pretrain.Options(dtypes=("fp32",))
    with pytest.raises(ValueError, match="not the same work"):
        bench_pretrain._check(options, {"ours fp32": 1.0, "original fp32": 1.1})
    with pytest.raises(ValueError, match="at least 1"):
        pretrain(PretrainArgs(pairs=0))
