"""`miss finetune` from a YAML file and a folder of images to checkpoint folders that answer; and its errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from miss.cli import run
from miss.engine.data.processor import Processor, build_tokenizer
from miss.models.config import TokenConfig
from miss.models.vqa import MissVQA
from miss.models.weights import load_checkpoint, save_checkpoint
from tests.engine.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
WORDS = "is there a mass what colour the image red green blue dark bright yes no ?".split()
COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}


def write_checkpoint(folder):
    import dataclasses

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = build_tokenizer(folder / "vocab.txt")
    (folder / "vocab.txt").unlink()
    ids = TokenConfig(pad=0, cls=2, sep=3, dec=tokenizer.token_to_id("[DEC]"), enc=tokenizer.token_to_id("[ENC]"))
    torch.manual_seed(1)
    config = dataclasses.replace(tiny_config(vocabulary=tokenizer.get_vocab_size()), tokens=ids)
    save_checkpoint(MissVQA(config), folder, tokenizer=tokenizer)


def write_data(folder, broken=False):
    folder.mkdir()
    rng = np.random.default_rng(5)
    for split, count in (("train", 12), ("validate", 3)):
        lines = []
        for i in range(count):
            name, colour = f"{split}{i}.png", list(COLOURS)[i % 3]
            pixels = np.clip(rng.normal(COLOURS[colour], 15, (40, 30, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name)
            for j, (question, answer) in enumerate(
                [("what colour is the image?", colour), ("is the image red?", "yes" if colour == "red" else "no")]
            ):
                lines.append({"image": name, "question": question, "answer": answer, "qid": f"{split}-{i}-{j}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if broken:
        (folder / "train3.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint to start from, a data set, a configuration; the folder that they are in."""
    folder = tmp_path_factory.mktemp("finetune")
    write_checkpoint(folder / "start")
    write_data(folder / "data")
    source = {"dataset": "jsonl", "root": str(folder / "data")}
    config = {
        "init": str(folder / "start"),
        "device": "cpu",
        "bf16": False,
        "standardise_features": True,
        "answer_prior": True,
        "data": {
            "train": [source],
            "validation": [{**source, "split": "validate"}],
            "images_per_step": 4,
            "questions_per_image": 0,
            "cache": str(folder / "cache"),
            "exclude_leaks": False,
        },
        "optimizer": {"rate_new": 1e-2, "rate_text": 3e-3},
        "schedule": {"total_steps": 60, "warmup_steps": 5},
        "augment": {"copies": 2},
        "checkpoint": {"every": 0},
        "validation": {"every": 30},
        "log": {"every": 10, "ceiling": False, "tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def finetune(place, *flags, output="out"):
    return run(["finetune", "--config", str(place / "config.yaml"), "--output", str(place / output), *flags])


def test_trains_answers_and_resumes_exactly(place, capsys):
    assert finetune(place, "--log.tensorboard", "true", "--log.ceiling", "true", output="whole") == 0
    whole = place / "whole"
    expected = {"best", "last", "checkpoints", "config.yaml", "environment.json", "log.jsonl", "loss.png"}
    assert expected | {"summary.json", "tensorboard"} == {p.name for p in whole.iterdir()}
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["step"] == 60 and summary["best"] >= 5 / 6, "it has to look at the image to get there"
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert {"train", "validation", "ceiling"} == {line["kind"] for line in lines}
    assert {"accuracy_open", "accuracy_closed", "accuracy_jsonl"} <= lines[-1].keys() and "ceiling_share" in lines[-2]
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["command"].startswith("miss finetune --config") and environment["torch"] == torch.__version__

    assert finetune(place, "--max-steps", "25", output="parts") == 0
    assert json.loads((place / "parts" / "summary.json").read_text())["step"] == 25
    assert finetune(place, output="parts") == 0
    assert "going on from" in capsys.readouterr().err
    for name in ("best", "last"):
        a, b = (load_file(place / output / name / "model.safetensors") for output in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    model, report = load_checkpoint(whole / "best")
    assert not report.missing and not report.unexpected
    processor = Processor.from_folder(whole / "best")
    assert processor.fingerprint == Processor.from_folder(place / "start").fingerprint

    # The folded norm: tokens of the training images have mean 0 and deviation 1 in every channel.
    pixels = np.stack([processor.image(np.asarray(Image.open(place / "data" / f"train{i}.png"))) for i in range(12)])
    with torch.no_grad():
        tokens = model.encode_images(torch.from_numpy(pixels)).flatten(0, 1)
    assert tokens.mean(0).abs().max() < 1e-3 and (tokens.std(0, correction=0) - 1).abs().max() < 1e-2


def test_the_image_encoder_can_be_trained(place):
    flags = [
        "--train-vision",
        "true",
        "--standardise-features",
        "false",
        "--max-steps",
        "3",
        "--data.accumulation",
        "2",
    ]
    assert finetune(place, *flags, output="vision") == 0
    start, last = (load_file(place / f / "model.safetensors") for f in ("start", "vision/last"))
    assert not torch.equal(start["vision.blocks.0.mlp.input.weight"], last["vision.blocks.0.mlp.input.weight"])


def test_dry_run_tries_everything_and_keeps_nothing(place, capsys):
    assert run(["finetune", "--config", str(place / "config.yaml"), "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert "parameters" in told and "24 questions on 12 images" in told and "nothing was kept" in told
    assert not (place / "out").exists()


def test_print_config_is_the_configuration_after_flags(place, capsys):
    flags = ["--print-config", "--optimizer.rate-new", "5e-5", "--data.train.0.weight", "2", "--bf16", "true"]
    assert run(["finetune", "--config", str(place / "config.yaml"), *flags]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"]["rate_new"] == 5e-5 and printed["data"]["train"][0]["weight"] == 2.0
    assert printed["bf16"] is True and printed["schedule"]["total_steps"] == 60


def write_config(place, name, **values):
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / name).write_text(yaml.safe_dump({**config, **values}))
    return str(place / name)


def test_numbers_with_an_exponent_are_numbers(place, capsys):
    (place / "short.yaml").write_text("optimizer: {rate_new: 3e-4, rate_text: 1E-4, rate_vision: 2.5e-5}\n")
    assert run(["finetune", "--config", str(place / "short.yaml"), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optimizer"]["rate_new"] == 3e-4


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({"optimiser": {}}, [], "unknown key optimiser (did you mean optimizer?)"),
        ({"init": None}, [], "no checkpoint to start from"),
        ({"init": "/nowhere/at/all"}, [], "/nowhere/at/all"),
        ({"device": "gpu"}, [], "accepted: auto, cpu, cuda"),
        ({"model": {"image_size": 30}}, [], "a multiple of the patch size (14)"),
        ({"optimizer": {"freeze": ["nothing.*"]}}, [], "matches no parameter"),
        ({}, ["--resume", "/nowhere"], "accepted: auto, none, or a folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(place, capsys, values, flags, message):
    path = write_config(place, "wrong.yaml", **values)
    assert run(["finetune", "--config", path, "--output", str(place / "wrong"), *flags]) == 1
    error = capsys.readouterr().err
    assert (
        message in error and "Traceback" not in error and error.strip().splitlines()[-1].startswith("miss finetune: ")
    )
    assert not (place / "wrong").exists() or not list((place / "wrong").glob("*.json*"))


def test_missing_and_malformed_files(place, capsys):
    (place / "bad.yaml").write_text("a: [1")
    (place / "list.yaml").write_text("- 1\n")
    for name, message in (("none.yaml", "No such file"), ("bad.yaml", "not YAML"), ("list.yaml", "wanted a mapping")):
        assert run(["finetune", "--config", str(place / name), "--output", str(place / "wrong")]) == 1
        assert message in capsys.readouterr().err
    assert run(["finetune", "--config", str(place / "config.yaml")]) == 1
    assert "--output: missing" in capsys.readouterr().err


def test_an_unknown_flag_is_a_usage_error_with_the_close_ones(place, capsys):
    with pytest.raises(SystemExit) as caught:
        run(["finetune", "--config", str(place / "config.yaml"), "--optimizer.rate-nwe", "1"])
    assert caught.value.code == 2 and "--optimizer.rate-new" in "".join(capsys.readouterr())


def test_images_that_cannot_be_read_are_named(place, capsys):
    write_data(place / "broken", broken=True)
    source = {"dataset": "jsonl", "root": str(place / "broken")}
    path = write_config(place, "broken.yaml", data={"train": [source], "validation": [], "exclude_leaks": False})
    assert run(["finetune", "--config", path, "--output", str(place / "wrong2")]) == 1
    error = capsys.readouterr().err
    assert "1 of 12 images cannot be read" in error and "train3.png" in error


def test_an_earlier_run_is_not_overwritten_by_a_new_one(place, capsys):
    assert finetune(place, "--max-steps", "1", output="first") == 0
    assert finetune(place, "--resume", "none", output="first") == 1
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert finetune(place, "--optimizer.rate-new", "0.5", output="first") == 1
    assert "optimizer.rate_new: 0.01 there, 0.5 now" in capsys.readouterr().err
    newest = place / "first" / "checkpoints" / "step-00000001"
    assert finetune(place, "--max-steps", "2", "--resume", str(newest), output="first") == 0
    (newest.parent / "step-00000002" / "state.json").write_text("{}")
    assert finetune(place, "--max-steps", "2", output="first") == 0
    assert "state.json" in (error := capsys.readouterr().err) and "trying the one before" in error


def test_empty_answers_are_left_out_and_named(place, capsys):
    import shutil

    shutil.copytree(place / "data", place / "gaps")
    lines = (place / "gaps" / "train.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "answer": " "})
    (place / "gaps" / "train.jsonl").write_text("\n".join(lines) + "\n")
    path = write_config(
        place, "gaps.yaml", data={"train": [{"dataset": "jsonl", "root": str(place / "gaps")}], "validation": []}
    )
    assert run(["finetune", "--config", path, "--output", str(place / "gapped"), "--max-steps", "1"]) == 0
    assert "1 training questions left out, their answer is empty: jsonl/train-0-0" in capsys.readouterr().err


def test_sigterm_saves_and_exits_143(place):
    output = place / "terminated"
    command = [
        sys.executable,
        "-m",
        "miss",
        "finetune",
        "--config",
        str(place / "config.yaml"),
        "--output",
        str(output),
    ]
    command += ["--schedule.total-steps", "1000000", "--log.every", "1", "--validation.every", "0"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (output / "log.jsonl").exists() or not (output / "log.jsonl").read_text():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGTERM)
    told, error = child.communicate(timeout=120)
    assert child.returncode == 143, error
    assert "SIGTERM: saved" in told and "Traceback" not in error
    assert (output / "last" / "model.safetensors").exists()
    saved = sorted((output / "checkpoints").glob("step-*"))
    assert len(saved) == 1 and int(saved[0].name.removeprefix("step-")) >= 1
