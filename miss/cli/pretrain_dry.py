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
    folder = Path(ranks.on_first(lambda: tempfile.mkdtemp(prefix="miss-dry-")))
    try:
        found: dict[str, Any] = {"ranks": ranks.world_size, **_plan(config, folder, ranks)}
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
    """Sizes, steps and bytes of the run as it is configured; a real part's passes are measured."""
    import torch

    from miss.engine.data.pair_sampler import PairSampler
    from miss.engine.training.optimizer import freeze, parameter_groups
    from miss.engine.training.pretrain import load_model, make_loader
    from miss.engine.training.pretrain_memory import rank_memory
    from miss.engine.training.pretrain_pairs import choose_pairs
    from miss.engine.training.pretrain_pass import measured
    from miss.engine.training.pretrain_plan import STAGES, Sizes, setting_of, step_bytes
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

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            total: torch.Tensor = model(part, seed=1).total
        return total

    one = measured(loss, model)
    sizes = Sizes.of(model, [group.parameters for group in parameter_groups(model, config.optimizer)])
    library, says = _deepspeed(sizes, ranks)
    setting = setting_of(config, model, chosen.train, len(chosen.validation), part, ranks.world_size, library)
    fullest = {stage: rank_memory(sizes, stage, setting, one) for stage in STAGES}
    run_ranks, data = max(2, ranks.world_size), config.data
    sampler = PairSampler(len(chosen.train), data.pairs_per_step, config.seed)
    return {
        "pairs": len(chosen.train),
        "validation_pairs": len(chosen.validation),
        "steps": config.schedule.total_steps,
        "steps_per_epoch": sampler.steps_per_epoch,
        "epochs": round(sampler.epoch_of_step(config.schedule.total_steps), 2),
        "sizes": dataclasses.asdict(sizes),
        "stage": "plain" if config.engine == "plain" else f"zero {config.zero_stage}",
        "memory": {stage: terms for stage, (_, terms) in fullest.items()},
        "fullest": {stage: when for stage, (when, _) in fullest.items()},
        "deepspeed_says": says,
        "sent_ranks": run_ranks,
        "sent": {
            s: step_bytes(sizes, s, run_ranks, config.bf16, data.pairs_per_step, data.accumulation) for s in STAGES
        },
    }


def _deepspeed(sizes: Any, ranks: "Ranks") -> tuple[int, dict[str, int]]:
    """What its import takes in memory, and its own estimates of bytes on a device; 0 and none where there is none."""
    from miss.engine.training.pretrain_pass import resident_bytes

    before = resident_bytes()
    try:
        from miss.engine.training.zero import estimates

        says = estimates(sizes.trained, sizes.largest, ranks.world_size, ranks.device.type)
    except ModuleNotFoundError:
        return 0, {}
    return resident_bytes() - before, says


def _through_everything(config: "PretrainConfig", folder: Path, ranks: "Ranks") -> int:
    """Two pairs a rank: a step, validation, saving and loading; the most that the process had in memory."""
    from miss.engine.training.checkpoint import CheckpointStore
    from miss.engine.training.pretrain import prepare
    from miss.engine.training.pretrain_pairs import ChosenPairs, read_pairs
    from miss.engine.training.pretrain_pass import most_resident_bytes
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
    return most_resident_bytes()


def _show(found: dict[str, Any]) -> None:
    tell(
        f"{found['pairs']:,} pairs ({found['validation_pairs']:,} more for validation), {found['steps']:,} steps, "
        f"{found['steps_per_epoch']:,} an epoch: {found['epochs']} epochs"
    )
    _show_memory(found)
    tell(f"sent by a rank of {found['sent_ranks']} in a step, MB:")
    for stage, parts in found["sent"].items():
        shown = ", ".join(f"{name} {value / 1e6:.1f}" for name, value in parts.items())
        tell(f"  {stage:>11}  {sum(parts.values()) / 1e6:.1f} ({shown})")
    most = ", ".join(f"{value / 1e6:.0f}" for value in found["largest_resident_bytes"])
    tell(f"two pairs a rank went through a step, validation, saving and loading; nothing was kept. Most, MB: {most}")


def _show_memory(found: dict[str, Any]) -> None:
    """A row for each engine and stage, a column for each kind that any of them has."""
    memory = found["memory"]
    names = [name for name in next(iter(memory.values())) if any(terms[name] for terms in memory.values())]
    tell(f"memory of a rank of {found['ranks']} (the first) when it holds most, MB:")
    rows = [["engine", *names, "sum", "when", "DeepSpeed's"]]
    for stage, terms in memory.items():
        says = found["deepspeed_says"].get(stage)
        cells = [f"{terms[name] / 1e6:.0f}" for name in names] + [f"{sum(terms.values()) / 1e6:.0f}"]
        mark = " *" if stage == found["stage"] else ""
        rows.append([stage + mark, *cells, found["fullest"][stage], "-" if says is None else f"{says / 1e6:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        tell("  " + " ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
