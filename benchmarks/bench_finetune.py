"""Finetuning grouped by image against one image a question, and its share of this machine's matrix product rate.

    python -m miss.benchmarks.bench_finetune [--images 12] [--questions 4] [--repeats 3] [--size 224]

A model of the `small` shapes with random weights, questions and answers as long as SLAKE's; bf16 autocast, word tables
frozen, AdamW, moving average: the step that `miss finetune` takes. Grouped: 12 images x 4 questions. Ungrouped: the
same 48 questions, each with an image of its own. Three ways to get image tokens: the encoder trained, the encoder
frozen but run in every step, and tokens cached (the recipe's). Medians over alternating repeats. Knows no data.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.rows import plain_rows
from miss.engine.data.loader import GroupedLoader, GroupedSampler, Row
from miss.engine.training.config import TrainConfig
from miss.engine.training.flops import matmul_ceiling
from miss.engine.training.optimizer import freeze
from miss.engine.training.plain import PlainEngine
from miss.engine.training.trainer import Interval, Trainer
from miss.kernels import registry
from miss.models.config import MissConfig
from miss.models.vqa import MissVQA


class Store:
    """Random pixels, or random tokens, of any image."""

    def __init__(self, config: MissConfig, cached: bool) -> None:
        size, patch = config.preprocess.image_size, config.vision.patch_size
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, generator=generator)
        shape = (1, (size // patch) ** 2 + 1, config.vision.hidden_size)
        self.tokens = torch.randn(shape, generator=generator).bfloat16() if cached else None

    def gather(self, images: Sequence[int], visits: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        if self.tokens is not None:
            return None, self.tokens.expand(len(images), -1, -1).contiguous()
        return self.pixels.expand(len(images), -1, -1, -1).contiguous(), None


def make_rows(num_images: int, num_questions: int) -> list[list[Row]]:
    """Questions of 6 to 16 tokens and answers of 3 to 5, first token and [SEP] included, as SLAKE's mostly are."""
    generator = torch.Generator().manual_seed(1)

    def ids(first: int, shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest - 2, longest - 1, (), generator=generator))
        return [first, *torch.randint(1000, 30000, (length,), generator=generator).tolist(), 102]

    flat = [Row(str(i), ids(30523, 6, 16), ids(30522, 3, 5)) for i in range(num_images * num_questions)]
    return [flat[i : i + num_questions] for i in range(0, len(flat), num_questions)]


def make_trainer(mode: str, grouped: bool, args: argparse.Namespace, folder: Path) -> Trainer:
    base = MissConfig.preset("small")
    no_dropout: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0}
    layers: dict[str, Any] = {"num_layers": args.layers} if args.layers else {}
    model_config = dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, **layers),
        encoder=dataclasses.replace(base.encoder, **no_dropout, **layers),
        decoder=dataclasses.replace(base.decoder, **no_dropout, **layers),
        preprocess=dataclasses.replace(base.preprocess, image_size=args.size),
    )
    rows = make_rows(args.images, args.questions)
    if not grouped:
        rows = [[row] for group in rows for row in group]
    config = TrainConfig.from_dict(
        {
            "train_vision": mode == "trained",
            "data": {"images_per_step": len(rows), "questions_per_image": 0, "validation": []},
            "optimizer": {"freeze": ["*.embeddings.word.weight", "*.embeddings.position.weight"]},
        }
    )
    torch.manual_seed(0)
    model = MissVQA(model_config).to(args.device)
    freeze(model, config.optimizer, config.train_vision)
    sampler = GroupedSampler([len(r) for r in rows], None, len(rows), 0, 0)
    loader = GroupedLoader(sampler, rows, Store(model_config, mode == "cached"), prefetch=0)
    engine = PlainEngine(model, config.optimizer)
    return Trainer(model, loader, engine, config, folder, device=torch.device(args.device))


def step_seconds(trainer: Trainer, index: int) -> tuple[float, float]:
    """Seconds of one step, batch building included, and its FLOPs."""
    interval = Interval()
    start = time.perf_counter()
    assert isinstance(trainer.loader, GroupedLoader)
    trainer._step(trainer.loader.build(index), interval)  # ends with the step's own wait for the device
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, interval.flops


def measure(mode: str, args: argparse.Namespace, folder: Path, ceiling: float) -> dict[str, Any]:
    trainers = {name: make_trainer(mode, name == "grouped", args, folder) for name in ("grouped", "ungrouped")}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    flops = dict.fromkeys(trainers, 0.0)
    for repeat in range(args.repeats + 1):
        for name, trainer in trainers.items():
            seconds, flops[name] = step_seconds(trainer, repeat)
            if repeat:  # the first warms up
                times[name].append(seconds)
    num_rows, result = args.images * args.questions, {}
    for name, values in times.items():
        seconds = statistics.median(values)
        result[name] = {
            "s_per_step": round(seconds, 4),
            "samples_per_s": round(num_rows / seconds, 2),
            "gflops_per_s": round(flops[name] / seconds / 1e9, 1),
            "ceiling_share": round(flops[name] / seconds / ceiling, 3),
        }
        print(f"{mode:>8} {name:>9}: " + "  ".join(f"{key} {value}" for key, value in result[name].items()), flush=True)
    ratio = result["grouped"]["samples_per_s"] / result["ungrouped"]["samples_per_s"]
    print(f"{mode:>8}   grouped / ungrouped: {ratio:.2f}x", flush=True)
    return {**result, "ratio": round(ratio, 2)}


def measure_rows(mode: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The grouped step by the operations' rows that run here against the `torch` rows, in turn."""
    plain = plain_rows()
    trainers = {name: make_trainer(mode, True, args, folder) for name in ("chosen", "torch")}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(args.repeats + 1):
        for name, trainer in trainers.items():
            with registry.use(**(plain if name == "torch" else {})):
                seconds, _ = step_seconds(trainer, repeat)
            if repeat:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {f"{name}_s": round(value, 4) for name, value in medians.items()}
    result["ratio"] = round(medians["torch"] / medians["chosen"], 3)
    print(f"{mode:>8}   " + "  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Finetuning, grouped by image against ungrouped.")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--layers", type=int, default=0, help="of every tower; 0: as the preset has them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", default="cached,frozen,trained")
    parser.add_argument("--rows", action="store_true", help="the rows that run here against the torch rows instead")
    args = parser.parse_args()
    ceiling = matmul_ceiling(torch.device(args.device), torch.bfloat16, seconds=1.0)
    print(f"bf16 matrix product rate: {ceiling / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        modes = {
            mode: measure_rows(mode, args, Path(folder)) if args.rows else measure(mode, args, Path(folder), ceiling)
            for mode in args.modes.split(",")
        }
    result = {
        "benchmark": "finetune rows" if args.rows else "finetune",
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step": {"images": args.images, "questions": args.questions, "image_size": args.size},
        "ceiling_gflops": round(ceiling / 1e9, 1),
        "modes": modes,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
