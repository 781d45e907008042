"""A run's state as files, every random number generator in it, and whether two configurations are the same run.

Knows tensors by name, safetensors and JSON; nothing here is pickled. Does not know folders' names or when to save.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miss.engine.training.config import RunConfig

# What a resumed run may say differently: none of it changes a step.
_FREE = ("device", "checkpoint", "validation", "log", "init", "engine", "zero_stage", "ds_config", "recompute")
_FREE_DATA = ("root", "cache", "prefetch", "workers", "accumulation")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; what two names share (a tied table) is there under the first only."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return tensors | {name: b for name, b in model.named_buffers() if b is not None}


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies saved tensors into the model.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    held = model_tensors(model)
    if set(held) != set(tensors):
        different = sorted(set(held) ^ set(tensors))
        raise ValueError(f"the checkpoint is of another model: {', '.join(different[:5])}")
    for name, tensor in tensors.items():
        if held[name].shape != tensor.shape and not (held[name].numel() == tensor.numel() == 1):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint; the model's is {tuple(held[name].shape)}"
            )
        held[name].copy_(tensor.reshape(held[name].shape))  # an engine may keep a scalar as a vector of one


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


Generators = tuple[dict[str, Tensor], dict[str, Any]]


def random_state() -> Generators:
    """The states of Python's, NumPy's, PyTorch's and each CUDA device's generator: tensors, and what JSON holds."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).view(np.uint8).copy())}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss_next = random.getstate()
    state = {
        "python": [version, list(numbers), gauss_next],
        "numpy": [kind, int(position), int(has_gauss), float(gauss)],
    }
    return tensors, state


def save_random(folder: Path, ranks: list[Generators] | None = None) -> None:
    """Every rank's generators, in the order of ranks; without any, this process's."""
    for rank, (tensors, state) in enumerate(ranks if ranks is not None else [random_state()]):
        save_file(tensors, folder / f"{_generators(rank)}.safetensors")
        (folder / f"{_generators(rank)}.json").write_text(json.dumps(state))


def _generators(rank: int) -> str:
    return f"random-{rank}" if rank else "random"


def load_random(folder: Path, rank: int = 0) -> bool:
    """The inverse of `save_random`; states of CUDA devices that are not here are left out.

    Returns:
        whether there was such a rank: a run that goes on with more ranks has new ones.
    """
    if not (folder / f"{_generators(rank)}.safetensors").exists():
        return False
    tensors = load_file(folder / f"{_generators(rank)}.safetensors")
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    state = json.loads((folder / f"{_generators(rank)}.json").read_text())
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().view(np.uint32), position, has_gauss, gauss))
    return True


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_same_run(saved: RunConfig, now: RunConfig) -> None:
    """Raises ValueError where two configurations would not take the same steps, naming the keys that differ."""

    def relevant(config: RunConfig) -> dict[str, Any]:
        values = {k: v for k, v in config.to_dict().items() if k not in _FREE}
        values["data"] = {k: v for k, v in values["data"].items() if k not in _FREE_DATA}
        return flatten(values)

    a, b = relevant(saved), relevant(now)
    different = [f"{key}: {a.get(key)} there, {b.get(key)} now" for key in sorted(a | b) if a.get(key) != b.get(key)]
    if different:
        raise ValueError(
            f"the checkpoint is of a run configured otherwise ({'; '.join(different[:4])}); resume with the same "
            f"values, or start a new run in another --output with --init"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
