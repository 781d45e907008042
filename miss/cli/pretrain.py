"""`miss pretrain`: trains a model on images with captions, from a YAML file whose every key is a flag too.

Knows YAML, flags and what to show; the training floor does the rest.
"""

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from miss.cli.runs import choose_checkpoint, config_path, read_yaml, tell, with_capitals, write_record
from miss.engine.training.pretrain_config import PretrainConfig
from miss.models.config import ConfigError

if TYPE_CHECKING:
    from miss.engine.training.pretrain import PretrainRun
    from miss.engine.training.ranks import Ranks


@dataclass
class Args:
    """Train a model on images with captions: contrast, matching, language modelling.

    miss pretrain --config configs/pretrain-small.yaml --init START --data captions.jsonl --output runs/pre

    On several processes: torchrun --nproc-per-node 2 -m miss pretrain … --zero 2; deepspeed, srun: docs/launching.md.
    Every key of the configuration is a flag: --optimizer.rate-new 1e-4 --losses.mlm 1 --bf16 false. In the end
    OUTPUT/best and OUTPUT/last are pretraining folders for `miss finetune --init` and `miss convert`.
    """

    config: Path | None = None
    """YAML file with the keys below; without one all have their defaults."""
    output: Path | None = None
    """Folder of the run: checkpoints, log.jsonl, loss.png, quarantine.jsonl, best/, last/."""
    data: tuple[Path, ...] = ()
    """Pairs instead of the configuration's: .jsonl or .csv files, packed folders, or folders with a captions.jsonl."""
    zero: int | None = None
    """Short for --engine zero --zero-stage N."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in --output, if any; none: start anew; or a checkpoint's folder."""
    max_steps: int | None = None
    """Stop (and save) once so many steps are done; the schedule keeps its length."""
    dry_run: bool = False
    """Show memory by rank, steps and communication; take one step on two pairs a rank, save, load; keep nothing."""
    print_config: bool = False
    """Print the configuration as it is after file and flags, and leave."""
    json: bool = False
    """Print the summary as one JSON object in the end."""
    command: tyro.conf.Suppress[str] = ""
    train: Annotated[PretrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(
        default_factory=PretrainConfig
    )


def read_args(argv: list[str], prog: str) -> Args:
    """Flags over the file that --config names over defaults; short flags over all."""
    argv = with_capitals(argv)
    path = config_path(argv)
    train = PretrainConfig.from_dict(read_yaml(path)) if path else PretrainConfig()
    default = Args(config=path, command=shlex.join([*prog.split(), *argv]), train=train)
    args = tyro.cli(Args, args=argv, prog=prog, default=default)
    train = args.train
    if args.zero is not None:
        train = dataclasses.replace(train, engine="zero", zero_stage=args.zero)
    if args.data:
        pairs = tuple(str(pairs_in(path)) for path in args.data)
        train = dataclasses.replace(train, data=dataclasses.replace(train.data, pairs=pairs))
    return dataclasses.replace(args, train=train)


def pairs_in(path: Path) -> Path:
    """The pairs that --data means: a file or a packed folder, or the captions that `miss transcap` left in a folder."""
    inside = path / "captions.jsonl"
    return inside if inside.is_file() else path


def main(args: Args) -> int:
    if args.print_config:
        print(yaml.safe_dump(args.train.to_dict(), sort_keys=False), end="")
        return 0
    if args.output is None and not args.dry_run:
        raise ConfigError("--output: missing; wanted the folder for checkpoints, logs and results")
    from miss.engine.training.ranks import Ranks

    with Ranks.from_environment(args.train.device) as ranks:
        if args.dry_run:
            from miss.cli.pretrain_dry import dry_run

            return dry_run(args.train, ranks, args.json)
        assert args.output is not None
        return train(args, args.output, ranks)


def train(args: Args, output: Path, ranks: "Ranks") -> int:
    from miss.engine.training.checkpoint import CheckpointStore
    from miss.engine.training.pretrain import prepare

    store = CheckpointStore(output / "checkpoints")
    if ranks.first:
        store.clean()
    resume = ranks.on_first(lambda: choose_checkpoint(args.resume, store))
    run = prepare(args.train, output, resume=resume, tell=tell, ranks=ranks)
    if ranks.first:
        write_record(args.train, args.command, output)
        describe(run, ranks)
        if resume is not None:
            tell(f"going on from {resume} (step {run.trainer.progress.step})")
    summary = run.trainer.fit(args.max_steps)
    if ranks.first:
        report(args, output, summary)
    return 0


def describe(run: "PretrainRun", ranks: "Ranks") -> None:
    """What will be trained on what, where."""
    config, model = run.config, run.model
    parameters = list(model.parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
    engine = f"ZeRO-{config.zero_stage}" if config.engine == "zero" else "plain PyTorch"
    tell(
        f"{model.config.name}: {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained; {engine} on "
        f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''}, {'bfloat16' if config.bf16 else 'float32'}"
    )
    images = len({pair.key for pair in run.pairs.train})
    sampler, data = run.loader.sampler, config.data
    tell(
        f"{len(run.pairs.train):,} pairs of {images:,} images, {len(run.pairs.validation):,} for validation; "
        f"{data.pairs_per_step} a step, {sampler.steps_per_epoch:,} steps an epoch, "
        f"{config.schedule.total_steps:,} steps: {sampler.epoch_of_step(config.schedule.total_steps):.1f} epochs"
    )


def report(args: Args, output: Path, summary: dict[str, Any]) -> None:
    best = (
        f"best {summary['metric']} {summary['best']:.4f} at step {summary['best_step']}" if summary["best_step"] else ""
    )
    folders = [str(output / name) for name in ("best", "last") if (output / name).is_dir()]
    tell(f"{summary['step']} of {summary['total_steps']} steps in {summary['seconds']:.0f} s. {best}")
    tell(f"pretraining folders (`miss finetune --init`, `miss convert`): {', '.join(folders)}")
    if args.json:
        print(json.dumps({**summary, "output": str(output), "folders": folders}))
