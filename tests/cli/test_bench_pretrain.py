"""`miss bench pretrain` end to end, small: both steps start from one loss, and the figures are there."""

import json

import pytest

from miss.benchmarks import bench_pretrain
from miss.cli.bench import PretrainArgs, pretrain


def test_both_run_and_agree(capsys):
    assert pretrain(PretrainArgs(pairs=2, size=28, steps=1, precision=("fp32",), json=True)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["rows"]) == {"ours fp32", "original fp32"} and found["ratios"]["original fp32 / ours fp32"] > 0
    assert found["gflop_per_step"] > 1


def test_other_work_is_refused_and_nonsense_said():
    options = bench_pretrain.Options(dtypes=("fp32",))
    with pytest.raises(ValueError, match="not the same work"):
        bench_pretrain._check(options, {"ours fp32": 1.0, "original fp32": 1.1})
    with pytest.raises(ValueError, match="at least 1"):
        pretrain(PretrainArgs(pairs=0))
