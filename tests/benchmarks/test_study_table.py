"""The pretraining study's table: paired differences, their verdicts, and what is refused; the chain's order."""

import json
from pathlib import Path

import numpy as np
import pytest

from miss.benchmarks.study_pretraining import Stage, Study, perform, read_study, stages
from miss.benchmarks.study_table import Answers, compare, markdown, read_answers
from miss.engine.training.pretrain_task import augments

ROOT = Path(__file__).resolve().parents[2]


def answers(right):
    right = np.asarray(right, dtype=float)
    count = right.shape[1]
    qids = [str(i) for i in range(count)]
    return Answers(right, qids, [f"image{i // 3}" for i in range(count)], np.arange(count) % 2 == 0)


def drawn(seed, share, shape=(2, 300)):
    return np.random.default_rng(seed).random(shape) < share


def test_a_gain_on_every_question_is_better_and_equal_arms_are_inside_the_noise():
    base = drawn(0, 0.5)
    better = base | drawn(1, 0.4)
    rows = {row.part: row for row in compare("slake", answers(base), answers(better), 500)}
    assert {row.verdict for row in rows.values()} == {"better"}
    assert rows["overall"].difference.value == pytest.approx(better.mean() - base.mean())
    assert rows["open"].difference.n == rows["closed"].difference.n == 150
    assert {row.verdict for row in compare("slake", answers(better), answers(base), 500)} == {"worse"}
    same = compare("slake", answers(base), answers(base), 500)
    assert {row.verdict for row in same} == {"inside the noise"}


def test_seeds_that_disagree_are_noise_whatever_the_interval_says():
    base = np.zeros((2, 300))
    mixed = np.stack([np.ones(300), np.zeros(300)])
    mixed[0, :3], base[1, :30] = 0, 1  # seed one gains much, seed two loses a little
    (overall, *_) = compare("slake", answers(base), answers(mixed), 500)
    assert overall.difference.interval[0] > 0 and overall.seeds[1] < 0
    assert overall.verdict == "inside the noise"


def test_pairing_narrows_the_interval():
    base = drawn(2, 0.5)
    shifted = base.copy()
    shifted[:, ::10] = True
    (paired, *_) = compare("slake", answers(base), answers(shifted), 500)
    low, high = paired.difference.interval
    width = paired.without.interval[1] - paired.without.interval[0]
    assert 0 < low and high - low < width


def write_predictions(folder, rows):
    folder.mkdir(parents=True)
    lines = [json.dumps({"qid": q, "correct": c, "answer_type": "open"}) for q, c in rows]
    (folder / "predictions.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def test_runs_are_joined_by_question_not_by_position(tmp_path):
    one = write_predictions(tmp_path / "one", [("a", True), ("b", False)])
    two = write_predictions(tmp_path / "two", [("b", False), ("a", True)])
    found = read_answers([one, two], {"a": "x", "b": "y"})
    assert found.right.tolist() == [[1, 0], [1, 0]] and found.images == ["x", "y"]
    other = write_predictions(tmp_path / "other", [("a", True), ("c", False)])
    with pytest.raises(ValueError, match="other questions"):
        read_answers([one, other], {"a": "x", "b": "y"})
    with pytest.raises(ValueError, match="not in the split"):
        read_answers([one], {"a": "x"})
    with pytest.raises(ValueError, match="miss evaluate"):
        read_answers([tmp_path / "none"], {})


def test_the_table_says_points_seeds_and_verdict():
    base = drawn(0, 0.5)
    text = markdown(compare("slake", answers(base), answers(base | drawn(1, 0.4)), 200))
    assert text.count("\n") == 5 and "better" in text and "slake, open (n = 150)" in text


def study(tmp_path, **fields):
    values = {"start": tmp_path / "start", "out": tmp_path / "out", "data": tmp_path, "seeds": (17, 18)}
    return Study(pretrain_steps=5, finetune_steps=3, copies=1, **{**values, **fields})


def test_both_arms_differ_in_where_they_start_and_in_nothing_else(tmp_path):
    found = {stage.name: stage.words for stage in stages(study(tmp_path))}
    for seed in (17, 18):
        without, with_ = (list(found[f"finetune-{arm}-{seed}"]) for arm in ("without", "with"))
        different = [(a, b) for a, b in zip(without, with_, strict=True) if a != b]
        assert [b.rsplit("/", 2)[-2:] for _, b in different] == [["pretrain", "last"], ["out", f"with-{seed}"]]
    assert len(found) == 1 + 4 + 1 + 1 + 2 * 2 * 3


def test_a_stage_that_is_done_is_not_done_again_nor_with_other_settings(tmp_path):
    made = study(tmp_path)
    calls = []
    stage = Stage("start", ("standardise", "a", "b"), lambda: calls.append(1))
    perform(made, stage)
    perform(made, stage)
    assert calls == [1]
    with pytest.raises(ValueError, match="other settings"):
        perform(made, Stage("start", ("standardise", "a", "c"), lambda: calls.append(2)))

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        perform(made, Stage("next", ("x",), fails))
    assert not (made.out / "done" / "next.json").exists() and calls == [1]


@pytest.mark.parametrize("flags", [[], ["--smoke"], ["--minutes", "60"]])
def test_every_training_command_is_one_that_the_command_line_takes(tmp_path, monkeypatch, flags):
    from miss.cli import finetune, pretrain  # they need tyro, which a GPU machine may lack

    monkeypatch.chdir(ROOT)
    made = read_study(["--start", str(tmp_path / "start"), "--out", "runs/x", "--data", str(tmp_path), *flags])
    for stage in stages(made):
        if stage.words[0] == "pretrain":
            train = pretrain.read_args(list(stage.words[1:]), "miss pretrain").train
            assert not train.train_vision and not augments(train) and len(train.data.pairs) == 4
            assert train.schedule.total_steps == made.pretrain_steps and train.data.exclude_held_out
        elif stage.words[0] == "finetune":
            train = finetune.read_args(list(stage.words[1:]), "miss finetune").train
            assert train.schedule.total_steps == made.finetune_steps and not train.standardise_features
            assert str(train.seed) in stage.name and not train.train_vision


def test_a_stage_to_stop_behind_must_exist(tmp_path):
    common = ["--start", "start", "--out", "out", "--data", str(tmp_path)]
    assert read_study([*common, "--until", "pretrain"]).until == "pretrain"
    with pytest.raises(SystemExit):
        read_study([*common, "--until", "nowhere"])
