"""A user's DeepSpeed configuration held against the run's: "auto" filled, contradictions found.

Knows DeepSpeed's keys and what of a run they speak of; does not know DeepSpeed itself: all else in the file is handed
on as it is.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.engine.training.config import OptimizerConfig, ScheduleConfig
from miss.models.config import ConfigError

AUTO = "auto"


@dataclass(frozen=True)
class RunFacts:
    """What of a run DeepSpeed's configuration may speak of, too.

    `stage`: None where the file alone says it. `width`: the model's, which sizes of buckets follow. `batch`: rows
    (images, pairs) of a whole step over all ranks; where it does not divide evenly, what a rank takes is rounded up.
    """

    optimizer: OptimizerConfig
    schedule: ScheduleConfig | None = None
    stage: int | None = None
    batch: int = 1
    accumulation: int = 1
    world_size: int = 1
    bf16: bool = False
    width: int = 768

    @property
    def micro_batch(self) -> int:
        return -(-self.batch // (self.accumulation * self.world_size))


def read_ds_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed configuration file.

    Raises:
        ConfigError: it is missing, or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"ds_config: {path}: {error.strerror}; wanted DeepSpeed's JSON") from None
    except ValueError as error:
        raise ConfigError(f"ds_config: {path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"ds_config: {path}: got {type(values).__name__}; wanted an object of keys")
    return values


def filled(given: Mapping[str, Any], run: RunFacts) -> dict[str, Any]:
    """What DeepSpeed is given: the file's own values, "auto" replaced by the run's.

    Optimizer and scheduler are left out, as the run's own are handed over, and clipping, which the loop asks for.

    Raises:
        ConfigError: the file and the run say different things, or "auto" stands where nothing can fill it.
    """
    values = copy.deepcopy(dict(given))
    problems: list[str] = []
    for key, ours, wanted in _facts(run):
        found = _get(values, key)
        if found == AUTO:
            _put(values, key, wanted)
        elif found is not None and not _equal(found, wanted):
            problems.append(f"{key} is {found!r} there; {ours} is {wanted!r} here")
    problems += _rates(values, run)
    if problems:
        raise ConfigError(f'ds_config contradicts the run: {"; ".join(problems)}. Change one, or say "auto" there')
    for section in ("optimizer", "scheduler", "gradient_clipping"):
        values.pop(section, None)
    for key, size in _sizes(run).items():
        if _get(values, f"zero_optimization.{key}") == AUTO:
            values["zero_optimization"][key] = size
    left = [key for key, value in _flat(values) if value == AUTO]
    if left:
        raise ConfigError(f'ds_config: nothing here fills "auto" of {", ".join(left)}: give a value, or leave it out')
    return _completed(values, run)


def keeps_whole(stage: int, bf16: bool) -> bool:
    """Whether a model under that stage keeps whole float32 parameters: stage 3 shards them, halves have masters."""
    return stage == 0 or (stage < 3 and not bf16)


def _facts(run: RunFacts) -> list[tuple[str, str, Any]]:
    """DeepSpeed's key, ours, the run's value."""
    micro, optimizer = run.micro_batch, run.optimizer
    whole = micro * run.accumulation * run.world_size
    facts: list[tuple[str, str, Any]] = [
        ("train_micro_batch_size_per_gpu", "a part of a step on a rank", micro),
        ("gradient_accumulation_steps", "data.accumulation", run.accumulation),
        ("train_batch_size", "the step over all ranks", whole),
        ("gradient_clipping", "optimizer.clip", optimizer.clip),
        ("bf16.enabled", "bf16", run.bf16),
        ("bfloat16.enabled", "bf16", run.bf16),
        ("fp16.enabled", "fp16 (bf16 is what there is)", False),
        ("optimizer.params.betas", "optimizer.beta1 and beta2", [optimizer.beta1, optimizer.beta2]),
        ("optimizer.params.eps", "optimizer.eps", optimizer.eps),
        ("optimizer.params.weight_decay", "optimizer.weight_decay", optimizer.weight_decay),
    ]
    if run.stage is not None:
        facts.append(("zero_optimization.stage", "zero_stage", run.stage))
    if run.schedule is not None:
        schedule = run.schedule
        facts += [
            ("scheduler.type", "the schedule", "WarmupCosineLR"),
            ("scheduler.params.warmup_num_steps", "schedule.warmup_steps", schedule.warmup_steps),
            ("scheduler.params.total_num_steps", "schedule.total_steps", schedule.total_steps),
            ("scheduler.params.cos_min_ratio", "schedule.final_share", schedule.final_share),
            ("scheduler.params.warmup_type", "the warm-up", "linear"),
        ]
    return facts


def _rates(values: dict[str, Any], run: RunFacts) -> list[str]:
    """Contradictions of what does not compare by one value: the optimiser's name, and one rate for our three."""
    problems = []
    name = _get(values, "optimizer.type")
    accepted = {"adamw": ("adamw", "adam"), "adamw8bit": ("adamw8bit",)}[run.optimizer.name]
    if name not in (None, AUTO) and str(name).lower() not in accepted:
        problems.append(f"optimizer.type is {name!r} there; optimizer.name is {run.optimizer.name!r} here")
    if name is not None and _get(values, "optimizer.params.adam_w_mode") is False:
        problems.append("optimizer.params.adam_w_mode is False there; weight decay is AdamW's here")
    ours = [run.optimizer.rate_new, run.optimizer.rate_text, run.optimizer.rate_vision]
    rate = _get(values, "optimizer.params.lr")
    if rate not in (None, AUTO) and not all(_equal(rate, own) for own in ours):
        problems.append(
            f"optimizer.params.lr is {rate!r} there; optimizer.rate_new, rate_text, rate_vision are {ours} here"
        )
    return problems


def _completed(values: dict[str, Any], run: RunFacts) -> dict[str, Any]:
    """What DeepSpeed needs to be told for our optimiser and loop, where the file is silent."""
    values.setdefault("train_micro_batch_size_per_gpu", run.micro_batch)
    values.setdefault("gradient_accumulation_steps", run.accumulation)
    values["gradient_clipping"] = 0.0  # not its default of 1: the loop clips once it has seen that the norm is finite
    values.setdefault("steps_per_print", 10**9)  # the loop has its own log
    values.setdefault("zero_allow_untested_optimizer", True)
    values.setdefault("zero_force_ds_cpu_optimizer", False)  # PyTorch's fused AdamW; theirs is compiled on first use
    zero = values.setdefault("zero_optimization", {})
    zero.setdefault("stage", run.stage if run.stage is not None else 0)
    bf16 = dict(values.pop("bfloat16", {})) | dict(values.get("bf16", {}))
    values["bf16"] = bf16 | {"enabled": run.bf16 and zero["stage"] > 0}  # stage 0: float32 under the loop's autocast
    if values["bf16"]["enabled"]:
        # Parts of a step add up in float32, as masters and moments are.
        values["data_types"] = {"grad_accum_dtype": "fp32"} | dict(values.get("data_types", {}))
    for key, size in _sizes(run).items():
        zero.setdefault(key, size)
    return values


def default_bucket(width: int) -> int:
    """Numbers in a bucket of gradients or weights for a model of that width."""
    return max(width**2, 2**22)


def _sizes(run: RunFacts) -> dict[str, int]:
    """Buckets that follow from the model's width, in numbers: DeepSpeed's own default of 5e8 takes 2 GB each."""
    bucket = default_bucket(run.width)
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 10 * run.width,
    }


def _get(values: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return None
        values = values[name]
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *outer, name = key.split(".")
    for part in outer:
        values = values[part]
    values[name] = value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return str(a).lower() == str(b).lower()
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return bool(a) == bool(b)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= 1e-12 * max(abs(a), abs(b))
    return bool(a == b)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values."""
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        out += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return out
