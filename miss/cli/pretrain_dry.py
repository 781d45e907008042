"""`miss pretrain --dry-run`: what a run takes; two samples a rank through everything, in a folder that goes away.

Knows what to show; the training floor measures.
"""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miss.cli.runs import tell

if TYPE_CHECKING:
    from miss.engine.training.pretrain_config import PretrainConfig
    from miss.engine.training.ranks import Ranks


def dry_run(config: "PretrainConfig", ranks: "Ranks", as_json: bool) -> int:
    from miss.engine.training.pretrain_plan import resident_bytes

    folder = Path(ranks.on_first(lambda: tempfile.mkdtemp(prefix="miss-dry-")))
    try:
        found: dict[str, Any] = {"ranks": ranks.world_size, "before_bytes": resident_bytes()}
        found |= _plan(config, folder, ranks)
        found["largest_resident_bytes"] = ranks.gather_objects(_through_everything(config, folder, ranks))
    finally:
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.first:
        _show(found)
        if as_json:
            print(json.dumps(found))
    return 0


def _plan(config: "PretrainConfig", folder: Path, ranks: "Ranks") -> dict[str, Any]:
    """Sizes, steps and bytes of the run as it is configured; a real part's forward pass is measured."""
    import torch

    from miss.engine.data.pair_sampler import PairSampler
    from miss.engine.training.optimizer import freeze
    from miss.engine.training.pretrain import load_model, make_loader
    from miss.engine.training.pretrain_pairs import choose_pairs
    from miss.engine.training.pretrain_plan import STAGES, Sizes, rank_memory, saved_bytes, step_bytes
    from miss.engine.training.setup import begin, nothing
    from miss.models.recompute import recompute_layers

    device = begin(config, ranks)
    say = tell if ranks.first else nothing
    model, processor = load_model(config, say)
    freeze(model, config.optimizer, config.train_vision)
    model.to(device)
    if config.recompute:
        recompute_layers(model)
    chosen = choose_pairs(config, folder / "plan", False, ranks, say)
    steps = make_loader(config, chosen.train, processor, folder / "plan", device, ranks).steps()
    part = max(next(steps), key=lambda batch: len(batch.ids)).to(device)
    steps.close()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        activations = max(ranks.gather_objects(saved_bytes(lambda: model(part, seed=1), model)))
    sizes, data = Sizes.of(model), config.data
    sampler = PairSampler(len(chosen.train), data.pairs_per_step, config.seed)
    run_ranks = max(2, ranks.world_size)
    return {
        "pairs": len(chosen.train),
        "validation_pairs": len(chosen.validation),
        "steps": config.schedule.total_steps,
        "steps_per_epoch": sampler.steps_per_epoch,
        "epochs": round(sampler.epoch_of_step(config.schedule.total_steps), 2),
        "sizes": dataclasses.asdict(sizes),
        "stage": "plain" if config.engine == "plain" else f"zero {config.zero_stage}",
        "memory": {s: rank_memory(sizes, s, ranks.world_size, config.bf16, activations) for s in STAGES},
        "deepspeed_says": _estimates(sizes, ranks),
        "sent_ranks": run_ranks,
        "sent": {
            s: step_bytes(sizes, s, run_ranks, config.bf16, data.pairs_per_step, data.accumulation) for s in STAGES
        },
    }


def _estimates(sizes: Any, ranks: "Ranks") -> dict[str, int]:
    """DeepSpeed's own, of bytes on a device; empty where it is not installed."""
    try:
        from miss.engine.training.zero import estimates

        return estimates(sizes.trained, sizes.largest, ranks.world_size, ranks.device.type)
    except ModuleNotFoundError:
        return {}


def _through_everything(config: "PretrainConfig", folder: Path, ranks: "Ranks") -> int:
    """Two pairs a rank: a step, validation, saving and loading; the most that the process had in memory."""
    import resource

    from miss.engine.training.checkpoint import CheckpointStore
    from miss.engine.training.pretrain import prepare
    from miss.engine.training.pretrain_pairs import ChosenPairs, read_pairs
    from miss.engine.training.setup import nothing

    few = read_pairs(config.data)[: 2 * ranks.world_size]
    small = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, pairs_per_step=2 * ranks.world_size, accumulation=1),
        schedule=dataclasses.replace(config.schedule, total_steps=1, warmup_steps=0),
        log=dataclasses.replace(config.log, tensorboard=False, ceiling=False),
    )
    run = prepare(small, folder, tell=nothing, ranks=ranks, pairs=ChosenPairs(few, few, {}))
    run.trainer.fit()
    newest = ranks.on_first(lambda: CheckpointStore(folder / "checkpoints").newest())
    assert newest is not None
    run.trainer.resume(newest)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _show(found: dict[str, Any]) -> None:
    tell(
        f"{found['pairs']:,} pairs ({found['validation_pairs']:,} more for validation), {found['steps']:,} steps, "
        f"{found['steps_per_epoch']:,} an epoch: {found['epochs']} epochs"
    )
    columns = list(next(iter(found["memory"].values())))
    tell(f"memory of a rank of {found['ranks']}, MB (beside {found['before_bytes'] / 1e6:.0f} of the process itself):")
    tell("  " + " ".join(f"{name:>11}" for name in ("engine", *columns, "sum", "DeepSpeed")))
    for stage, parts in found["memory"].items():
        says = found["deepspeed_says"].get(stage)
        cells = [*(f"{value / 1e6:.0f}" for value in parts.values()), f"{sum(parts.values()) / 1e6:.0f}"]
        mark = " *" if stage == found["stage"] else ""
        line = [stage, *cells, "-" if says is None else f"{says / 1e6:.0f}"]
        tell("  " + " ".join(f"{cell:>11}" for cell in line) + mark)
    tell(f"sent by a rank of {found['sent_ranks']} in a step, MB:")
    for stage, parts in found["sent"].items():
        shown = ", ".join(f"{name} {value / 1e6:.1f}" for name, value in parts.items())
        tell(f"  {stage:>11}  {sum(parts.values()) / 1e6:.1f} ({shown})")
    most = ", ".join(f"{value / 1e6:.0f}" for value in found["largest_resident_bytes"])
    tell(f"two pairs a rank went through a step, validation, saving and loading; nothing was kept. Most, MB: {most}")
