"""`miss pretrain` on two processes: from pairs to an evaluated checkpoint, exact resume under ZeRO, the same order as
one process."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from miss.cli import run
from tests.engine.test_cli_finetune import write_data
from tests.engine.test_zero import start
from tests.engine.tiny_pairs import write_config, write_pairs, write_start

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")


def run_cases(place, name, world_size, cases, seconds=120):
    arguments = ["-m", "tests.engine.pretrain_worker", str(place), str(place / f"{name}-RANK.json"), *cases]
    processes = start(world_size, arguments)
    with ThreadPoolExecutor(2) as pool:  # both at once: a process whose output nobody reads stands still
        output = list(pool.map(lambda process: process.communicate(timeout=seconds)[0], processes))
    for rank in range(world_size):
        path = place / f"{name}-{rank}.json"
        assert path.is_file(), f"rank {rank} of {name} left without results: {output[rank][-2000:]}"
        for case, result in json.loads(path.read_text()).items():
            assert result["failure"] is None, f"{case} on rank {rank} of {name}:\n{result['failure']}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_start(folder / "start")
    write_pairs(folder / "pairs", 50, broken=[2])
    write_config(folder, data={"corrupt_share": 0.5})
    exact = {"model": {"dropout": 0.0, "attention_dropout": 0.0}, "losses": {"negatives_among": 4}}
    exact |= {"data": {"corrupt_share": 0.5}, "validation": {"pairs": 5, "batch_pairs": 2}}  # one rank has a part more
    write_config(folder, "exact.yaml", schedule={"total_steps": 3}, **exact)
    run_cases(folder, "one", 1, ["shared_validation", "same_order"])
    run_cases(folder, "two", 2, ["shared_validation", "exact_resume", "seconds_add_up", "same_order"])
    return folder


def test_two_ranks_resume_exactly_and_take_one_rank_s_order(place):
    assert (place / "whole" / "last" / "model.safetensors").is_file()


def test_from_pairs_to_an_evaluated_checkpoint(place, tmp_path, capsys):
    """The README's way: what two ranks pretrained is converted, finetuned as it is, and evaluated."""
    last = str(place / "whole" / "last")
    assert run(["convert", last, str(tmp_path / "answering")]) == 0
    assert "untied" in capsys.readouterr().out
    write_data(tmp_path / "data")
    source = f"{{'dataset': 'jsonl', 'root': '{tmp_path / 'data'}'}}"
    (tmp_path / "tune.yaml").write_text(
        f"data: {{train: [{source}], validation: [], exclude_leaks: false, images_per_step: 3}}\n"
        "schedule: {total_steps: 3, warmup_steps: 1}\nbf16: false\nlog: {ceiling: false, tensorboard: false}\n"
    )
    flags = ["finetune", "--config", str(tmp_path / "tune.yaml"), "--init", last, "--output", str(tmp_path / "tuned")]
    assert run(flags) == 0
    assert "untied" in capsys.readouterr().err
    validation = str(tmp_path / "data" / "validate.jsonl")
    evaluate = ["evaluate", "--checkpoint", str(tmp_path / "tuned" / "last"), "--dataset", "jsonl", "--split", "all"]
    assert run([*evaluate, "--data", validation, "--out", str(tmp_path / "scored"), "--no-baselines"]) == 0
    metrics = json.loads((tmp_path / "scored" / "metrics.json").read_text())
    assert "6" in json.dumps(metrics)


@pytest.mark.torture
def test_every_stage_resumes_exactly(place):
    run_cases(place, "more", 2, ["other_stages"], 300)
