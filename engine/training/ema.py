"""A float32 moving average of the trained weights.

Knows parameters by name; does not know optimisers, files, or what the average is used for.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """`average = decay * average + (1 - decay) * weight` after each update, for every parameter that is trained.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the random start is forgotten in the first steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, values: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Takes the weights' present values into the average, in one call for all tensors.

        values: the weights by name, part after part, where the model's own are not whole or not precise.
        """
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for part in (self._weights,) if values is None else values:
            weights = [p.detach().float().view_as(self.average[name]) for name, p in part.items()]
            torch._foreach_lerp_([self.average[name] for name in part], weights, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average; afterwards exactly the weights it had (tensors change places)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._weights.items():
            average = self.average[name]
            self.average[name], parameter.data = parameter.data, average.to(parameter.dtype)

    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Restores what `average` and `num_updates` were.

        Raises:
            ValueError: the tensors are not those of the parameters that are trained now.
        """
        if set(tensors) != set(self.average):
            different = sorted(set(tensors) ^ set(self.average))
            raise ValueError(f"the saved moving average is of other parameters: {', '.join(different[:5])}")
        for name, tensor in tensors.items():
            self.average[name].copy_(tensor)
        self.num_updates = num_updates
