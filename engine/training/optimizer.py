"""Which parameters are trained, at which rate, with which decay.

Knows parameter names and AdamW; does not know the loss, the schedule or who calls backward.
"""

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from miss.engine.training.config import OptimizerConfig
from miss.models.config import ConfigError

# What MISS adds to a pretrained text model: cross-attention and the language-model head start from nothing.
_NEW = ("cross_attention", "cross_kv", "decoder.head")
_NO_DECAY_NAMES = ("cls_token", "position_embedding")


@dataclass(frozen=True)
class Group:
    """One of AdamW's parameter groups: the names in it, its full rate, its decay."""

    name: str
    rate: float
    weight_decay: float
    parameters: tuple[str, ...]


def layer_group(name: str) -> str:
    """`vision`, `new` or `text`: the layer group that a parameter's name puts it in."""
    if name.startswith("vision."):
        return "vision"
    return "new" if any(part in name for part in _NEW) else "text"


def freeze(model: nn.Module, config: OptimizerConfig, train_vision: bool) -> list[str]:
    """Sets `requires_grad` of every parameter; returns the names of those that stay as they are.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.freeze:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"optimizer.freeze: {pattern!r} matches no parameter; for example {names[-1]}")
    frozen = []
    for name, parameter in model.named_parameters():
        stays = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.freeze)
        stays = stays or (layer_group(name) == "vision" and not train_vision)
        parameter.requires_grad_(not stays)
        if stays:
            frozen.append(name)
    if len(frozen) == len(names):
        raise ConfigError("optimizer.freeze leaves nothing to train")
    return frozen


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """The parameters that require gradients, by layer group, with and without weight decay."""
    rates = {"new": config.rate_new, "text": config.rate_text, "vision": config.rate_vision}
    members: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(_NO_DECAY_NAMES)
            members.setdefault((layer_group(name), decays), []).append(name)
    return [
        Group(f"{group}{'' if decays else ', no decay'}", rates[group], config.weight_decay * decays, tuple(names))
        for (group, decays), names in sorted(members.items())
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; `base_rate` is the group's rate.

    `adamw`: PyTorch's, one fused call for all tensors (CPU and CUDA). `adamw8bit`: bitsandbytes', whose moments of
    tensors of 4,096 numbers and more are 8-bit codes with a scale for each 256.

    Raises:
        ImportError: bitsandbytes is wanted and not installed.
    """
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in group.parameters],
            "lr": group.rate,
            "base_rate": group.rate,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in parameter_groups(model, config)
    ]
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            f"optimizer.name: adamw8bit is bitsandbytes', which cannot be imported here ({error}): "
            f"pip install 'miss-engine[bitsandbytes]', or optimizer.name: adamw"
        ) from None
    return AdamW8bit(groups, betas=betas, eps=config.eps)  # type: ignore[no-any-return]


def by_parameter(tensors: Mapping[str, Tensor], trained: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """An optimiser's saved state `KIND/NAME` as NAME -> KIND -> tensor.

    Raises:
        ValueError: it is of parameters that are not trained now.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = tensor
    strange = sorted(set(by_name) - set(trained))
    if strange:
        raise ValueError(f"the saved optimiser holds {strange[:5]}, which are not trained now")
    return by_name


def check_kind(saved: Collection[str], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where a parameter's saved state is not of the kind that this optimiser keeps."""
    own, theirs = ("exp_avg", "state1") if isinstance(optimizer, torch.optim.AdamW) else ("state1", "exp_avg")
    if theirs in saved or own not in saved:
        names = {"exp_avg": "adamw", "state1": "adamw8bit"}
        raise ValueError(
            f"the saved optimiser holds {', '.join(sorted(saved))}: it is optimizer.name: {names[theirs]}; this run's "
            f"is {names[own]}. Go on with the one that the run began with"
        )
