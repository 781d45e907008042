"""Linear and label-smoothed cross entropy as others compute it, with its gradient: eager, compiled, Liger.

Knows PyTorch and Liger's function; does not know our implementations. Never run on a GPU here, Liger never at all.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Bound, Peer

_SMOOTHING = 0.1


def _eager(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, labels, label_smoothing=_SMOOTHING, reduction="none")


def _binder(loss: Callable[..., Tensor]) -> Callable[..., Bound]:
    """The loss of each row, and the gradients of the hidden states and the table for a gradient of ones."""

    def bind(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Bound:
        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
                out = loss(*leaves, bias, labels)
                return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

        return run

    return bind


def _compiled(*inputs: Any) -> Bound:
    return _binder(torch.compile(_eager))(*inputs)


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Bound:
    """Its losses are summed: of a sum the gradient of every row's loss is one, too. It gives no loss by rows."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(label_smoothing=_SMOOTHING, reduction="sum")

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
            total = loss(leaves[1], leaves[0], labels, bias)
            return torch.autograd.grad(total, leaves)

    return run


def cross_entropy(device: torch.device) -> Iterator[Peer]:
    missing = None if device.type == "cuda" else "needs CUDA"
    yield Peer("eager", _binder(_eager))
    yield Peer("compiled", _compiled, missing)
    absent = None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
    yield Peer("liger", _liger, missing or absent, skips=1)
