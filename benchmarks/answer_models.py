"""The checkpoints and the jobs that whole answers are measured with, made once in a work folder.

Knows presets, seeded weights, images and questions; does not know peers.

`base` and `large` have seeded random weights and BLIP's preprocessing; `small` is the one that ships. Those whose speed
is measured are made to answer with exactly as many tokens as are asked for: the bias of [SEP] is lowered beyond reach.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from miss.benchmarks.peers.job import Job
from miss.engine.data.datasets import DataError, Sample, load_dataset
from miss.engine.data.images import decode_image
from miss.engine.data.processor import Processor
from miss.engine.runtime.engine import find_checkpoint
from miss.models.config import MissConfig, PreprocessConfig
from miss.models.original import CLIP_MEAN, CLIP_STD
from miss.models.vqa import MissVQA
from miss.models.weights import TOKENIZER, load_checkpoint, read_config, save_checkpoint

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUESTION_TOKENS = 18  # a question of SLAKE-English, [ENC] and [SEP] included
_NEVER = -1e4
_VERSION = 1  # of what this file writes; another makes checkpoints and conversions anew


@dataclass(frozen=True)
class Model:
    """A checkpoint folder, and the folder beside it for what peers make of it."""

    checkpoint: Path
    work: Path


def default_work() -> Path:
    """`$XDG_CACHE_HOME/miss-engine/peers`, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miss-engine" / "peers"


def timed_model(preset: str, image_size: int, work: Path) -> Model:
    """The model whose speed is measured.

    Raises:
        ValueError: no such preset, or a size that is not a multiple of its patches.
    """
    folder = work / f"{preset}-{image_size}px-v{_VERSION}"
    if not (folder / "checkpoint").is_dir():
        model = _shipped(image_size) if preset == "small" else _random(preset, image_size)
        with torch.no_grad():
            model.decoder.head.bias[model.config.tokens.sep] = _NEVER
        save_checkpoint(model, folder / "checkpoint", tokenizer=find_checkpoint("miss-small") / TOKENIZER)
    return Model(folder / "checkpoint", folder)


def judged_model(work: Path) -> Model:
    """The model whose answers are judged: the one that ships, as it is."""
    checkpoint = find_checkpoint("miss-small")
    version = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:8]
    return Model(checkpoint, work / f"miss-small-{version}-v{_VERSION}")


def image_size_of(preset: str) -> int:
    """Where none is asked for: 384 pixels, or what the shipped checkpoint was trained with."""
    return read_config(find_checkpoint("miss-small"))[0].preprocess.image_size if preset == "small" else 384


def _shipped(image_size: int) -> MissVQA:
    model, _ = load_checkpoint(find_checkpoint("miss-small"), dtype=torch.float32)
    if image_size != model.config.preprocess.image_size:
        size = model.config.preprocess.image_size
        raise ValueError(f"--preset small --image-size {image_size}: wanted {size}, which it was trained with")
    return model


def _random(preset: str, image_size: int) -> MissVQA:
    """Weights about their initial values, biases and norms away from 0 and 1, so that every one counts."""
    config = MissConfig.preset(preset)
    preprocess = PreprocessConfig(image_size, "bicubic", CLIP_MEAN, CLIP_STD, 1 / 255)
    config = replace(config, vision=replace(config.vision, image_size=image_size), preprocess=preprocess)
    torch.manual_seed(0)
    model = MissVQA(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.dim() > 1 else 0.1))
    return model


def samples(data: Path | None, split: str) -> list[Sample]:
    """Questions of SLAKE; none where it is not there."""
    try:
        return load_dataset("slake", data, split, "en")
    except DataError:
        return []


def timed_job(model: Model, data: Path | None, images: int, questions_per_image: int, num_tokens: int) -> Job:
    """Real images, and questions of 18 tokens of real words."""
    processor = Processor.from_folder(model.checkpoint)
    pixels = [pixels for pixels, _ in zip(_images(processor, data, "validate"), range(images), strict=False)]
    pixels = [pixels[i % len(pixels)] for i in range(images)]
    texts = [_question(processor, i) for i in range(images * questions_per_image)]
    ids = np.array([processor.question(text) for text in texts], np.int64)
    assert ids.shape[1] == QUESTION_TOKENS
    return Job(np.stack(pixels), texts, ids, num_tokens)


_WORDS = ("what", "organ", "is", "this", "image", "of", "the", "left", "lung", "or", "right", "liver", "there", "a")


def _question(processor: Processor, seed: int) -> str:
    """A question of exactly 18 tokens: each of these words is one."""
    words = np.random.default_rng(seed).choice(_WORDS, QUESTION_TOKENS - 2)
    return " ".join(words)


def _images(processor: Processor, data: Path | None, split: str) -> Iterator[np.ndarray]:
    """Different images of a split, spread over it; the examples where there is no data."""
    found = list(dict.fromkeys(str(sample.image) for sample in samples(data, split)))
    paths = [Path(p) for p in found[:: max(1, len(found) // 128)]] or sorted(EXAMPLES.glob("*.jpg"))
    for path in paths:
        yield processor.image(decode_image(path))


def calibration_jobs(model: Model, data: Path | None, images: int, folder: Path) -> list[Path]:
    """Files of jobs of one training image each, with a question of its own where there is one."""
    processor = Processor.from_folder(model.checkpoint)
    asked = {str(sample.image): sample.question for sample in samples(data, "train")}
    names = list(asked)[:: max(1, len(asked) // images)][:images]
    found = [(Path(name), asked[name]) for name in names]
    found = found or [(path, "what modality is this image?") for path in sorted(EXAMPLES.glob("*.jpg"))]
    paths = []
    for i, (path, text) in enumerate(found):
        pixels = processor.image(decode_image(path))[None]
        job = Job(pixels, [text], np.array([processor.question(text)], np.int64), 1)
        paths.append(folder / f"calibration-{i}.npz")
        job.save(paths[-1])
    return paths


def judged_jobs(model: Model, chosen: list[Sample], num_tokens: int) -> list[tuple[Job, list[Sample]]]:
    """Jobs of one image and its questions of one length each: nobody's padding is anybody's handicap."""
    processor = Processor.from_folder(model.checkpoint)
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in chosen:
        groups.setdefault((str(sample.image), len(processor.question(sample.question))), []).append(sample)
    found = []
    for (image, _), asked in groups.items():
        pixels = processor.image(decode_image(Path(image)))[None]
        ids = np.array([processor.question(sample.question) for sample in asked], np.int64)
        found.append((Job(pixels, [sample.question for sample in asked], ids, num_tokens), asked))
    return found
