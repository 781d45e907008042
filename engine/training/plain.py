"""The contract of what drives an update, and plain PyTorch as its first holder.

Knows gradients, the optimiser and sums over ranks; does not know the model's inputs, the schedule, or when a checkpoint
is due.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miss.engine.training.config import OptimizerConfig
from miss.engine.training.optimizer import build_optimizer, by_parameter, check_kind
from miss.engine.training.ranks import ALONE, Ranks


class Engine(Protocol):
    """What a training loop asks of an engine. A step, which every rank takes:

        for each part: loss = engine(batch, …); engine.backward(loss, last)
        norm = engine.gradient_norm()           the same on all ranks; not finite if any rank's gradients are not
        engine.step(share, clip, norm)          only where losses and norm were finite on all ranks
        for values in engine.values(names): …   what follows the weights: a moving average, a momentum twin

    All of a step's parts have the same modules in the same order on every rank. State is whole and by name, so that
    another engine, stage or number of ranks goes on with it.
    """

    whole: bool  # the model's own parameters are whole and precise between calls; else read `values`, never them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of one part of the step; `last` says that no further part follows.

        loss: this rank's, such that the mean over ranks of the sum over parts is the step's loss.
        """

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients together, a float32 scalar on the device, before clipping."""

    def step(self, rate_share: float, max_norm: float, norm: float) -> None:
        """Clips to `max_norm` (0: not) knowing the norm, updates at that share of the rates, drops gradients."""

    def values(self, names: Collection[str] | None = None) -> Iterator[dict[str, Tensor]]:
        """The trained parameters' values (of these names) as precise as they are kept, whole, on the device, part after
        part; not to be changed, or kept beyond the next part. All ranks go through all parts."""

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by its name in the model, whole, as precise as it is kept: CPU tensors on rank 0, nothing on
        the others. What a checkpoint and an export hold, from any stage."""

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `weights`, exactly; every rank is given all of them."""

    def state(self) -> dict[str, Tensor]:
        """The optimiser's state, whole, by parameter: `exp_avg/NAME`, …; CPU tensors on rank 0, nothing on others."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, exactly; every rank is given all of it.

        Raises:
            ValueError: it is of other parameters, or of an optimiser whose state cannot go on here.
        """


class PlainEngine:
    """One optimiser on one device, or the same one on every rank, with the mean of their gradients."""

    whole = True

    def __init__(self, model: nn.Module, config: OptimizerConfig, ranks: Ranks = ALONE) -> None:
        self.model, self.ranks = model, ranks
        self.optimizer = build_optimizer(model, config)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        check_same_start(model, ranks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if last and self.ranks.world_size > 1:
            with self.ranks.watched("the mean of gradients"):
                self._average_gradients()

    def _average_gradients(self) -> None:
        """One sum over ranks of all gradients in one piece; a gradient that only others have is theirs, too."""
        has = torch.tensor([p.grad is not None for p in self._parameters], device=self.ranks.device).int()
        dist.all_reduce(has, dist.ReduceOp.MAX)
        used = [p for p, one in zip(self._parameters, has.tolist(), strict=True) if one]
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in used if p.grad is not None]
        flat = torch._utils._flatten_dense_tensors(grads)
        dist.all_reduce(flat)
        flat /= self.ranks.world_size
        torch._foreach_copy_(grads, list(torch._utils._unflatten_dense_tensors(flat, grads)))

    def gradient_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)

    def step(self, rate_share: float, max_norm: float, norm: float) -> None:
        if 0 < max_norm < norm:
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], max_norm / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * rate_share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def values(self, names: Collection[str] | None = None) -> Iterator[dict[str, Tensor]]:
        held = {self._names[id(p)]: p.detach() for p in self._parameters}
        yield {name: value for name, value in held.items() if names is None or name in names}

    def weights(self) -> dict[str, Tensor]:
        if not self.ranks.first:
            return {}
        return {name: p.detach().cpu() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(tensors[name])

    def state(self) -> dict[str, Tensor]:
        return whole_state(self.optimizer, self._names) if self.ranks.first else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        load_whole_state(self.optimizer, self._names, tensors)


def whole_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """State of an optimiser that holds whole parameters, by `KIND/NAME`, on the CPU. `names`: by id of parameter."""
    return {
        f"{kind}/{names[id(p)]}": torch.as_tensor(value)
        .detach()
        .cpu()
        .contiguous()
        .clone()  # 8-bit codes share their maps
        for group in optimizer.param_groups
        for p in group["params"]
        for kind, value in optimizer.state[p].items()
    }


def load_whole_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `whole_state`; a parameter that never had a gradient has none."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_name = by_parameter(tensors, [names[id(p)] for p in parameters])
    for p in parameters:
        saved = by_name.get(names[id(p)])
        if saved is not None:
            check_kind(saved, optimizer)
            optimizer.state[p] = {kind: value_of(kind, value, p.device) for kind, value in saved.items()}


def value_of(kind: str, saved: Tensor, device: torch.device) -> Tensor | int:
    """One value of an optimiser's state: bitsandbytes counts steps in int, PyTorch in float32 beside fused moments."""
    if kind == "step" and not saved.is_floating_point():
        return int(saved)
    return saved.to(device, copy=True)


def check_same_start(model: nn.Module, ranks: Ranks) -> None:
    """Raises ValueError where ranks start from different weights: each would train another model."""
    if ranks.world_size == 1:
        return
    with torch.no_grad():
        sums = torch.stack([p.double().sum() for p in model.parameters()])
    everyone = ranks.gather(sums[None])[0].cpu()
    different = [r for r in range(ranks.world_size) if not torch.equal(everyone[r], everyone[0])]
    if different:
        raise ValueError(f"ranks {different} start from other weights than rank 0: seed and load them all alike")
