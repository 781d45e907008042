"""`miss finetune`: trains a checkpoint to answer questions, from a YAML file whose every key is a flag too.

Knows YAML, flags, and how validation's answers are judged; the training floor does the rest.
"""

import dataclasses
import os
import shlex
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from miss.cli.runs import choose_checkpoint, config_path, read_yaml, tell, with_capitals, write_record
from miss.engine.training.config import TrainConfig
from miss.models.config import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from miss.engine.data.processor import Processor
    from miss.engine.training.finetune import Finetuning
    from miss.engine.training.mix import Questions
    from miss.engine.training.ranks import Ranks
    from miss.engine.training.trainer import Validate


@dataclass
class Args:
    """Train a checkpoint to answer questions about images.

    miss finetune --config configs/finetune-slake.yaml --init START --output runs/slake [--key value …]

    Every key of the configuration is a flag: --optimizer.rate-new 1e-4 --data.train.0.weight 2 --bf16 false. In the end
    OUTPUT/best and OUTPUT/last are checkpoint folders for `miss answer` and `miss evaluate`, with averaged weights.
    """

    config: Path | None = None
    """YAML file with the keys below; without one all have their defaults."""
    output: Path | None = None
    """Folder of the run: checkpoints, log.jsonl, loss.png, best/, last/."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in --output, if any; none: start anew; or a checkpoint's folder."""
    max_steps: int | None = None
    """Stop (and save) once so many steps are done; the schedule keeps its length."""
    dry_run: bool = False
    """Read everything, show sizes, take one step on two images, save, load; nothing of it is kept."""
    print_config: bool = False
    """Print the configuration as it is after file and flags, and leave."""
    command: tyro.conf.Suppress[str] = ""
    train: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(
        default_factory=TrainConfig
    )


def read_args(argv: list[str], prog: str) -> Args:
    """Flags over the file that --config names over defaults."""
    argv = with_capitals(argv)
    path = config_path(argv)
    train = TrainConfig.from_dict(read_yaml(path)) if path else TrainConfig()
    default = Args(config=path, command=shlex.join([*prog.split(), *argv]), train=train)
    return tyro.cli(Args, args=argv, prog=prog, default=default)


def main(args: Args) -> int:
    if args.print_config:
        print(yaml.safe_dump(args.train.to_dict(), sort_keys=False), end="")
        return 0
    if args.output is None and not args.dry_run:
        raise ConfigError("--output: missing; wanted the folder for checkpoints, logs and results")
    if args.dry_run:
        return dry_run(args)
    assert args.output is not None
    return finetune(args, args.output)


def finetune(args: Args, output: Path) -> int:
    """Alone, or as one of the processes that torchrun, deepspeed or srun started; the first of them speaks."""
    from miss.engine.training.ranks import Ranks

    with Ranks.from_environment(args.train.device) as ranks:
        return train(args, output, ranks)


def train(args: Args, output: Path, ranks: "Ranks") -> int:
    from miss.engine.training.checkpoint import CheckpointStore
    from miss.engine.training.finetune import prepare

    store = CheckpointStore(output / "checkpoints")
    if ranks.first:
        store.clean()
    resume = ranks.on_first(lambda: choose_checkpoint(args.resume, store))
    validate = make_validate(args.train)
    run = prepare(args.train, output, validate=validate, resume=resume, tell=tell, ranks=ranks)
    if not ranks.first:
        run.trainer.fit(args.max_steps)
        return 0
    write_record(args.train, args.command, output)
    describe(run)
    if resume is not None:
        tell(f"going on from {resume} (step {run.trainer.progress.step})")
    summary = run.trainer.fit(args.max_steps)
    best = (
        f"best {summary['metric']} {summary['best']:.4f} at step {summary['best_step']}" if summary["best_step"] else ""
    )
    tell(f"{summary['step']} of {summary['total_steps']} steps in {summary['seconds']:.0f} s. {best}")
    tell(f"checkpoint folders: {', '.join(str(output / n) for n in ('best', 'last') if (output / n).is_dir())}")
    return 0


def make_validate(config: TrainConfig) -> Any:
    """How validation's answers are made and judged: greedily, by exact match after the documented normaliser."""

    def for_questions(processor: "Processor", questions: "Questions") -> "Validate":
        return lambda model: exact_match_metrics(model, processor, questions, config)

    return for_questions


def exact_match_metrics(
    model: "nn.Module", processor: "Processor", questions: "Questions", config: TrainConfig
) -> dict[str, float]:
    """`accuracy` over all questions, by answer type and by data set, and the mean over data sets (`accuracy_sets`)."""
    from miss.engine.evaluation.protocols import answer_type, exact_match
    from miss.engine.runtime.batch import answer_batch
    from miss.engine.runtime.sampler import SamplingParams
    from miss.models.vqa import MissVQA

    assert isinstance(model, MissVQA)
    device = next(model.parameters()).device
    params = SamplingParams(num_beams=1, max_new_tokens=config.validation.max_new_tokens, num_alternatives=0)
    right: dict[str, list[bool]] = defaultdict(list)
    for part, samples in questions.batches(config.validation.batch_questions):
        batch = part.batch.to(device)
        tokens = None if batch.image_tokens is None else batch.image_tokens.to(next(model.parameters()).dtype)
        images = batch.pixels if tokens is None else tokens
        assert images is not None
        made = answer_batch(model, images, batch.image_index, batch.question_ids, batch.question_lengths, params)
        for sample, hypotheses in zip(samples, made, strict=True):
            text = processor.decode(hypotheses[0].token_ids)
            for key in ("accuracy", answer_type(sample.answer_type, sample.answer), f"set {sample.dataset}"):
                right[key].append(exact_match(text, sample.answer))
    shares = {key: sum(values) / len(values) for key, values in right.items()}
    sets = {key.removeprefix("set "): value for key, value in sorted(shares.items()) if key.startswith("set ")}
    metrics = {"accuracy": shares["accuracy"], "accuracy_sets": sum(sets.values()) / len(sets)}
    metrics |= {f"accuracy_{kind}": shares[kind] for kind in ("open", "closed") if kind in shares}
    return metrics | {f"accuracy_{name}": value for name, value in sets.items()}


def dry_run(args: Args) -> int:
    """Everything once, small, in a folder that goes away."""
    from miss.engine.training.finetune import prepare
    from miss.engine.training.ranks import place_from

    if (size := place_from(os.environ).world_size) != 1:
        raise ConfigError(f"--dry-run: got {size} processes; wanted one: it tries one step on two images")
    small = {"total_steps": 1, "warmup_steps": 0}
    train = dataclasses.replace(
        args.train,
        data=dataclasses.replace(args.train.data, images_per_step=2, accumulation=1, cache=None),
        schedule=dataclasses.replace(args.train.schedule, **small),  # type: ignore[arg-type]
        augment=dataclasses.replace(args.train.augment, copies=1),
        log=dataclasses.replace(args.train.log, tensorboard=False, ceiling=False),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(train, Path(folder), validate=make_validate(train), tell=tell, most_images=2)
        describe(run)
        tell(f"steps: {args.train.schedule.total_steps}, {steps_an_epoch(args.train, run):.0f} an epoch")
        run.trainer.fit()
        newest = run.trainer.store.newest()
        assert newest is not None
        run.trainer.resume(newest)
    tell("dry run: one step, validation, saving and loading work; nothing was kept")
    return 0


def steps_an_epoch(config: TrainConfig, run: "Finetuning") -> float:
    return sum(group.weight for group in run.mix_train) / config.data.images_per_step


def describe(run: "Finetuning") -> None:
    """What will be trained on what, and the memory that weights and optimiser take."""
    parameters = list(run.model.parameters())
    total, trained = (sum(p.numel() for p in ps) for ps in (parameters, [p for p in parameters if p.requires_grad]))
    bytes_each = 4 + 8 + (4 if run.config.ema.decay else 0)
    tell(
        f"{run.model.config.name}: {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained; weights, gradients, "
        f"optimiser and average: {(4 * total + bytes_each * trained) / 1e6:.0f} MB"
    )
    for name, groups in (("train", run.mix_train), ("validation", run.mix_validation)):
        sets: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for group in groups:
            sets[group.samples[0].dataset][0] += 1
            sets[group.samples[0].dataset][1] += len(group.samples)
        tell(f"{name}: " + ", ".join(f"{key} {q} questions on {i} images" for key, (i, q) in sets.items()))
