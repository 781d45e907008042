"""What finetuning and pretraining runs begin with alike: seeds, the device, the model's overrides, the engine.

Knows configurations and engines; does not know data, tasks or the loop.
"""

import dataclasses
import os
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from miss.engine.training.config import ModelConfig
from miss.engine.training.plain import Engine, PlainEngine
from miss.engine.training.ranks import Ranks
from miss.engine.training.state import seed_everything
from miss.engine.training.zero_config import RunFacts, keeps_whole, read_ds_config
from miss.models.config import MissConfig
from miss.models.recompute import recompute_layers

M = TypeVar("M", bound=nn.Module)


def begin(config: Any, ranks: Ranks) -> torch.device:
    """Seeds everything, asks for determinism where the run does, and says where this process computes."""
    seed_everything(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with a fixed workspace
    torch.use_deterministic_algorithms(config.deterministic)
    return pick_device(config.device) if ranks.world_size == 1 else ranks.device


def with_overrides(old: MissConfig, wanted: ModelConfig) -> MissConfig:
    """A checkpoint's configuration with a run's dropout, drop-path and image size.

    Raises:
        ValueError: the image size is no multiple of the patch size.
    """
    rates: dict[str, Any] = {"dropout": wanted.dropout, "attention_dropout": wanted.attention_dropout}
    text = {name: rate for name, rate in rates.items() if rate is not None}
    vision: dict[str, Any] = {} if wanted.drop_path is None else {"drop_path": wanted.drop_path}
    size: dict[str, Any] = {} if wanted.image_size is None else {"image_size": wanted.image_size}
    new = dataclasses.replace(
        old,
        encoder=dataclasses.replace(old.encoder, **text),
        decoder=dataclasses.replace(old.decoder, **text),
        vision=dataclasses.replace(old.vision, **vision),
        preprocess=dataclasses.replace(old.preprocess, **size),
    )
    if new.preprocess.image_size % new.vision.patch_size:
        raise ValueError(
            f"model.image_size: got {new.preprocess.image_size}; wanted a multiple of the patch size "
            f"({new.vision.patch_size})"
        )
    return new


def build_engine(
    config: Any, model: M, ranks: Ranks, batch: int, accumulation: int, width: int
) -> tuple[M | None, Engine]:
    """The engine that a run asks for, and a copy of the model where the engine does not keep the model itself whole.

    Args:
        config: with `engine`, `zero_stage`, `ds_config`, `bf16`, `recompute`, `optimizer` and `schedule`.
        batch: rows (images, pairs) of a whole step.
        width: of the model.
    """
    if config.recompute:
        recompute_layers(model)
    if config.engine == "plain":
        return None, PlainEngine(model, config.optimizer, ranks)
    from miss.engine.training.zero import ZeroEngine

    facts = RunFacts(
        config.optimizer,
        config.schedule,
        config.zero_stage,
        batch,
        accumulation,
        ranks.world_size,
        config.bf16,
        width,
    )
    given = {} if config.ds_config is None else read_ds_config(Path(config.ds_config))
    copy = None if keeps_whole(config.zero_stage, config.bf16) else copy_of(model)
    return copy, ZeroEngine(model, facts, ranks, given)


def copy_of(model: M) -> M:
    """The same weights in memory of their own; its layers' states are kept, as nothing is trained in it. What is no
    weight (pretraining's `memory`) stays one and the same."""
    memory = getattr(model, "memory", None)
    copy = deepcopy(model, {} if memory is None else {id(memory): memory})
    recompute_layers(copy, on=False)
    return copy


def nothing(text: str) -> None:
    """What ranks but the first say."""


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {name!r}; accepted: auto, cpu, cuda, cuda:N ({reason})") from None
    return device
