"""`miss pretrain` on one process: exact resume, what is saved, validation, what is kept out, errors."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from miss.cli import run
from miss.engine.training.checkpoint import CheckpointStore
from miss.engine.training.log import read_log
from miss.engine.training.pretrain import load_model, prepare
from miss.engine.training.pretrain_config import PretrainConfig
from miss.engine.training.pretrain_pairs import split
from miss.engine.training.pretrain_validation import recall
from miss.engine.training.ranks import TalkClock
from miss.engine.training.spent import Spent
from miss.models.config import ConfigError
from miss.models.pretrain_files import load_pretrained
from tests.engine.tiny_pairs import tiny_pretrain_config, write_config, write_pairs, write_start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_start(folder / "start")
    write_pairs(folder / "pairs")
    return folder


def fitted(config, output, stop_at=None, resume=None):
    made = prepare(config, Path(output), resume=resume, tell=lambda text: None)
    return made, made.trainer.fit(stop_at)


def newest(output):
    return CheckpointStore(Path(output) / "checkpoints").newest()


def state(output):
    folder = newest(output)
    tensors = {f"{p.name}:{k}": t for p in folder.glob("*.safetensors") for k, t in load_file(p).items()}
    return tensors, {p.name: p.read_text() for p in folder.glob("*.json") if p.name != "MANIFEST.json"}


def test_a_stopped_and_resumed_run_is_the_whole_one_bitwise(place, tmp_path):
    """Weights, moments, twin, queue and its pointer, generators, figures; with parts, a corrupt image and MLM."""
    write_pairs(tmp_path / "pairs", broken=[3])
    (tmp_path / "start").symlink_to(place / "start")
    data = {"accumulation": 2, "corrupt_share": 0.5}
    config = tiny_pretrain_config(tmp_path, data=data, losses={"mlm": 0.5}, ema={"decay": 0.9})
    fitted(config, tmp_path / "whole")
    fitted(config, tmp_path / "parts", stop_at=3)
    torch.manual_seed(999)
    random.seed(999)
    np.random.seed(999)
    made, summary = fitted(config, tmp_path / "parts", resume=newest(tmp_path / "parts"))
    assert (summary["step"], summary["resumed_from"]) == (6, 3)
    (a, texts_a), (b, texts_b) = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert texts_a == texts_b and a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    assert {"memory.safetensors:queue.pointer", "memory.safetensors:twin.text_projection.weight"} <= a.keys()
    logs = [
        [{k: v for k, v in line.items() if k.startswith(("loss", "recall", "matched"))} for line in read_log(f)]
        for f in (tmp_path / "whole" / "log.jsonl", tmp_path / "parts" / "log.jsonl")
    ]
    assert logs[0] == logs[1] and len(logs[0]) >= 8
    listed = (tmp_path / "parts" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in listed] == ["pairs/captions/3.png"]


def test_last_is_a_pretraining_folder_of_the_run_s_end(place, tmp_path):
    made, _ = fitted(tiny_pretrain_config(place), tmp_path)
    model, report = load_pretrained(tmp_path / "last")
    own = {**dict(made.model.named_parameters()), **made.model.memory.tensors()}
    loaded = {**dict(model.named_parameters()), **model.memory.tensors()}
    assert own.keys() == loaded.keys() and all(torch.equal(own[n], loaded[n]) for n in own)
    twin = dict(model.memory.twin.named_parameters())
    assert not [n for n, p in model.named_parameters() if n in twin and p.dim() > 1 and torch.equal(p, twin[n])]
    # a new run goes on from it, twin and queue included; with another size of queue these start anew
    again, _ = load_model(tiny_pretrain_config(place, init=str(tmp_path / "last")), lambda text: None)
    assert all(torch.equal(again.memory.tensors()[n], t) for n, t in model.memory.tensors().items())
    told = []
    config = tiny_pretrain_config(place, init=str(tmp_path / "last"), losses={"queue_size": 8})
    other, _ = load_model(config, told.append)
    assert len(other.memory.queue) == 8 and "starts anew" in told[0]
    assert torch.equal(other.memory.twin.text_projection.weight, other.text_projection.weight)


def test_frozen_parts_stay_and_the_twin_follows_all(place, tmp_path):
    config = tiny_pretrain_config(place, train_vision=False, optimizer={"freeze": ["*.embeddings.*"]})
    start, _ = load_model(config, lambda text: None)
    before = {n: p.detach().clone() for n, p in start.named_parameters()}
    made, _ = fitted(config, tmp_path)
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert not [n for n in moved if n.startswith("vision.") or ".embeddings." in n] and "matching_head.weight" in moved


def test_it_learns_to_match(place, tmp_path):
    """Losses fall, and retrieval on pairs that were held out gets far better than chance."""
    config = tiny_pretrain_config(
        place,
        model={"dropout": 0.0, "attention_dropout": 0.0},
        schedule={"total_steps": 60, "warmup_steps": 5},
        data={"pairs_per_step": 16},
        losses={"queue_size": 32},
        log={"every": 5},
    )
    fitted(config, tmp_path)
    lines = read_log(tmp_path / "log.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 1
    assert all(abs(line["loss"] - sum(line[f"loss_{k}"] for k in ("itc", "itm", "lm"))) < 1e-4 for line in train)
    last = [line for line in lines if line["kind"] == "validation"][-1]
    assert {"loss_itc", "image_to_text_5", "text_to_image_1", "recall_chance"} <= last.keys()


@given(st.integers(1, 60), st.integers(0, 30), st.integers(0, 5))
def test_validation_holds_whole_images_out(num_images, count, seed):
    class One:
        def __init__(self, key):
            self.key = key

    pairs = [One(f"{i % num_images}") for i in range(2 * num_images)]
    train, held = split(pairs, count, seed)
    assert len(held) <= min(count, len(pairs) // 10) and len(train) + len(held) == len(pairs)
    assert not {p.key for p in train} & {p.key for p in held}
    assert split(pairs, count, seed)[1] == held


def test_recall_counts_equal_captions_as_one():
    """Three images, two captions; the second image's own caption comes second."""
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.8, 0.0], [1.0, 0.9, 0.0]])  # the third has the first's caption
    found = recall(image, text, ["a", "b", "c"], torch.tensor([7, 9, 7]))
    assert found["image_to_text_1"] == pytest.approx(2 / 3) and found["image_to_text_5"] == 1.0
    assert found["text_to_image_1"] == 1.0 and found["recall_chance"] == 0.5


def test_a_run_goes_on_with_its_own_pairs_only(place, tmp_path, capsys):
    (tmp_path / "start").symlink_to(place / "start")
    pairs = write_pairs(tmp_path / "pairs")
    config = write_config(tmp_path)
    flags = ["pretrain", "--config", str(config), "--output", str(tmp_path / "run"), "--max-steps", "1", "--json"]
    assert run(flags) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["step"] == 1 and summary["total_steps"] == 6
    lines = pairs.read_text().splitlines(True)
    pairs.write_text("".join(lines[1:]))
    assert run(flags) == 1 and "began with other pairs" in capsys.readouterr().err


def test_configurations_go_there_and_back_and_refuse(place):
    config = tiny_pretrain_config(place)
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert PretrainConfig().ema.decay == 0
    for values, words in [
        ({"losses": {"qeue_size": 1}}, "did you mean queue_size"),
        ({"losses": {"itc": 0.0, "itm": 0.0, "lm": 0.0}}, "every weight is 0"),
        ({"preset": "tiny"}, "accepted: small, base, large"),
        ({"augment": {"copies": 3}}, "cached tokens"),
        ({"ds_config": "x.json"}, "engine: zero"),
    ]:
        with pytest.raises(ConfigError, match=words):
            PretrainConfig.from_dict(values)


def test_a_dry_run_says_what_a_run_takes_and_keeps_nothing(place, tmp_path):
    """In a process of its own: other tests' tensors would be taken off what the process holds."""
    config = write_config(place, "dry.yaml")
    command = [sys.executable, "-m", "miss", "pretrain", "--config", str(config), "--dry-run", "--json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, err = json.loads(done.stdout), done.stderr
    assert found["pairs"] == 36 and found["steps_per_epoch"] == 5 and found["epochs"] == 1.33
    assert not list(tmp_path.glob("miss-dry-*")) and "nothing was kept" in err
    model, _ = load_model(tiny_pretrain_config(place), lambda text: None)
    numbers = sum(p.numel() for p in model.parameters())
    plain, sharded = found["memory"]["plain"], found["memory"]["zero 2"]
    assert plain["weights"] == 4 * numbers and plain["moments"] == 8 * numbers and plain["process"] > 1e8
    assert plain["queue"] == 20 * (2 * 16 * 4 + 8) + 8 and found["fullest"].keys() == found["memory"].keys()
    assert sharded["masters"] == 4 * numbers and found["sent"]["zero 3"]["weights"] == 4 * numbers


def test_time_is_of_the_innermost_kind_and_adds_up():
    talk = TalkClock()
    spent = Spent(talk)
    started = time.perf_counter()
    with talk.running(), talk.running():
        time.sleep(0.02)
    with spent.on("validation"):
        time.sleep(0.01)
        with spent.on("checkpoint"), talk.running():
            time.sleep(0.03)
    before = spent.seconds()
    time.sleep(0.01)
    found = spent.since(before)
    assert found["compute"] >= 0.01 and found["checkpoint"] == 0
    assert 0.02 <= before["communication"] < 0.03 <= before["checkpoint"] and 0.01 <= before["validation"] < 0.03
    assert sum(spent.seconds().values()) == pytest.approx(time.perf_counter() - started, abs=2e-3)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--output: missing"),
        (["--output", "OUT"], "no checkpoint to start from"),
        (["--output", "OUT", "--init", "START"], "no file of pairs"),
        (["--output", "OUT", "--init", "START", "--data", "nowhere.jsonl"], "no such file"),
    ],
)
def test_what_is_missing_is_said(place, tmp_path, capsys, flags, words):
    names = {"OUT": str(tmp_path / "out"), "START": str(place / "start")}
    assert run(["pretrain", *(names.get(f, f) for f in flags), "--log.ceiling", "false"]) == 1
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1] and error.splitlines()[-1].startswith("miss pretrain: ")


def test_a_fresh_model_starts_from_a_vocabulary(place, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n")
    config = PretrainConfig(preset="small", tokenizer=str(place / "start"))
    with pytest.raises(ValueError, match="wanted a vocabulary with"):
        load_model(config)
