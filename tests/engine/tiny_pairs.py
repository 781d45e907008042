"""Image-text pairs, a checkpoint and a configuration small enough to pretrain in a test."""

import dataclasses
import json

import numpy as np
import torch
import yaml
from PIL import Image

from miss.engine.data.processor import build_tokenizer
from miss.engine.training.pretrain_config import PretrainConfig
from miss.models.config import TokenConfig
from miss.models.vqa import MissVQA
from miss.models.weights import save_checkpoint
from tests.engine.tiny import tiny_config

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}
SHADES = {"dark": 0.5, "bright": 1.0}
WORDS = "a an the image picture of is in colour what there it red green blue grey dark bright mass yes no ? .".split()


def write_start(folder):
    """An answering checkpoint to pretrain from, with a vocabulary of its own."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = build_tokenizer(folder / "vocab.txt")
    (folder / "vocab.txt").unlink()
    ids = TokenConfig(pad=0, cls=2, sep=3, dec=tokenizer.token_to_id("[DEC]"), enc=tokenizer.token_to_id("[ENC]"))
    torch.manual_seed(1)
    config = dataclasses.replace(tiny_config(vocabulary=tokenizer.get_vocab_size()), tokens=ids)
    save_checkpoint(MissVQA(config), folder, tokenizer=tokenizer)


def write_pairs(folder, count=40, broken=()):
    """captions.jsonl and its images; those whose numbers are in `broken` cannot be decoded."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    lines = []
    for i in range(count):
        colour, shade = list(COLOURS)[i % 4], list(SHADES)[i // 4 % 2]
        pixels = np.clip(rng.normal(np.array(COLOURS[colour]) * SHADES[shade], 15, (40, 30, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        captions = [f"a {shade} {colour} image.", f"the picture is {shade}, it is {colour}."]
        lines.append({"image": f"{i}.png", "captions": captions})
    for i in broken:
        (folder / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "captions.jsonl"


def tiny_pretrain_values(place, **values):
    """A configuration as a dictionary: 12 steps of 8 pairs in float32."""
    defaults = {
        "init": str(place / "start"),
        "device": "cpu",
        "bf16": False,
        "model": {"dropout": 0.1, "attention_dropout": 0.1},
        "data": {"pairs": [str(place / "pairs" / "captions.jsonl")], "exclude_held_out": False, "pairs_per_step": 8},
        "losses": {"feature_width": 16, "queue_size": 20, "momentum": 0.9, "alpha_ramp_steps": 4},
        "optimizer": {"rate_new": 3e-3, "rate_text": 3e-3, "rate_vision": 1e-3},
        "schedule": {"total_steps": 6, "warmup_steps": 2},
        "checkpoint": {"every": 0},
        "validation": {"every": 4, "pairs": 4, "batch_pairs": 4},
        "log": {"every": 1, "tensorboard": False, "ceiling": False},
    }
    merged = {k: {**v, **values.pop(k, {})} if isinstance(v, dict) else values.pop(k, v) for k, v in defaults.items()}
    return {**merged, **values}


def tiny_pretrain_config(place, **values):
    return PretrainConfig.from_dict(tiny_pretrain_values(place, **values))


def write_config(place, name="config.yaml", **values):
    (place / name).write_text(yaml.safe_dump(tiny_pretrain_values(place, **values)))
    return place / name
