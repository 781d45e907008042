"""The contract of what drives an update, and plain PyTorch as its first holder.

Knows gradients and the optimiser; does not know the model's inputs, the schedule, or when a checkpoint is due.
"""

from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miss.engine.training.config import OptimizerConfig
from miss.engine.training.optimizer import build_adamw


class Engine(Protocol):
    """What the training loop asks of an engine. A step: `backward` for each part, `gradient_norm`, `step`."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of one part of the step; `last` says that no further part follows."""

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients together, a float32 scalar on the device, before clipping."""

    def step(self, rate_share: float, max_norm: float, norm: float) -> None:
        """Clips to `max_norm` (0: not) knowing the norm, updates at that share of the rates, drops gradients."""

    def save(self, folder: Path) -> None:
        """Writes the optimiser's state into the folder."""

    def load(self, folder: Path) -> None:
        """The inverse of `save`, exactly."""


class PlainEngine:
    """Fused AdamW on one device."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.optimizer = build_adamw(model, config)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)

    def step(self, rate_share: float, max_norm: float, norm: float) -> None:
        if 0 < max_norm < norm:
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], max_norm / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * rate_share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        tensors = {
            f"{key}/{self._names[id(p)]}": value.contiguous()
            for p in self._parameters
            for key, value in self.optimizer.state[p].items()
        }
        save_file(tensors, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / "optimizer.safetensors").items():
            kind, _, name = key.partition("/")
            by_name.setdefault(name, {})[kind] = tensor
        trained = {self._names[id(p)] for p in self._parameters}
        if not set(by_name) <= trained:
            raise ValueError(
                f"the saved optimiser holds {sorted(set(by_name) - trained)[:5]}, which are not trained now"
            )
        for p in self._parameters:
            saved = by_name.get(self._names[id(p)])
            if saved is not None:  # a parameter that never had a gradient has no state
                self.optimizer.state[p] = {
                    kind: value.to(p.device) if kind != "step" or p.is_cuda else value for kind, value in saved.items()
                }
