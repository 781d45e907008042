"""Layers whose inner states are thrown away after the forward pass and computed again in the backward pass.

Knows layers as calls; does not know what is in them, or which engine trains them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


class Stack(nn.Module):
    """A module of layers, each entered by a call, so that what others hook to it (gathering, say) sees it."""

    recompute = False

    def through(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """`layer(*args, **kwargs)`. Whatever is drawn follows seeds: the same gradients."""
        if not (self.recompute and torch.is_grad_enabled()):
            return layer(*args, **kwargs)  # type: ignore[no-any-return]
        with set_checkpoint_early_stop(False):  # hooks behind the layer must run again, too: some release its weights
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)  # type: ignore[no-any-return]


def recompute_layers(model: nn.Module, on: bool = True) -> None:
    """Switches recomputation for every stack in the model: a third more time for 1/layers of the states' memory.

    Raises:
        ValueError: the model has no stack of layers.
    """
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no stack of layers whose states could be computed again")
    for stack in stacks:
        stack.recompute = on
