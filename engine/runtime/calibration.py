"""What a model's linear layers see on real questions: the second moments of their inputs, weighted by what matters.

Knows batches and linear layers; does not know how weights are packed.

A token's weight comes from the loss's gradient at the layer's output: tokens that the answer does not depend on (such
as padding) count nothing, the others between half and ten times the average.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.models.linear import Linear
from miss.models.quantized import linear_modules
from miss.models.vqa import MissVQA, VQABatch

_FLOOR, _CEILING = 0.5, 10.0
TOKENS_A_COLUMN = 8
_ROWS_A_CALL, _ROWS = 16, 256  # of a layer's inputs, kept as they are


@dataclass
class Moments:
    """Sums over the tokens that one layer saw.

    inputs: float32 (K, K), the weighted sum of x x^T. mean: (K,), the weighted sum of x. weight: the sum of weights.
    outputs: (N,), the sum of the squared gradient at each output. tokens: how many counted.
    rows: some of the inputs themselves, (n, K) each: what int8 activations cost depends on their largest numbers.
    """

    inputs: Tensor
    mean: Tensor
    outputs: Tensor
    weight: float = 0.0
    tokens: int = 0
    rows: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, layer: Linear) -> "Moments":
        columns, rows = layer.in_features, layer.out_features
        return cls(torch.zeros(columns, columns), torch.zeros(columns), torch.zeros(rows))

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """One call of the layer: x (tokens, K), the loss's gradient at its outputs (tokens, N)."""
        squared = gradient.square()
        size = squared.sum(1)
        counted = size > 0
        if not counted.any():
            return
        x, size = x[counted], size[counted]
        weight = (size / size.mean()).clamp_(_FLOOR, _CEILING)
        self.inputs.addmm_((x * weight[:, None]).T, x)
        self.mean += weight @ x
        self.outputs += squared.sum(0)
        self.weight += float(weight.sum())
        self.tokens += len(x)
        if sum(map(len, self.rows)) < _ROWS:
            self.rows.append(x[:: -(-len(x) // _ROWS_A_CALL)].clone())

    @property
    def sample(self) -> Tensor:
        """(n, K): inputs from all calls alike; empty where none counted."""
        return torch.cat(self.rows) if self.rows else self.mean.new_zeros(0, len(self.mean))

    def scaled(self, scale: Tensor) -> "Moments":
        """The moments of inputs divided by `scale` (K,)."""
        inputs = self.inputs / (scale[:, None] * scale)
        return replace(self, inputs=inputs, mean=self.mean / scale, rows=[rows / scale for rows in self.rows])

    @property
    def suffices(self) -> bool:
        """Whether so many tokens were seen that an int8 layer may be bent to them. The decoder's few, most of them
        [DEC], know nothing of later places in an answer: rounding errors made good on 2,600 of them turned an answer of
        miss-small into one word twenty times over, which rounding alone leaves as it is."""
        return self.tokens >= TOKENS_A_COLUMN * len(self.mean)

    @property
    def hessian(self) -> Tensor:
        """(K, K): the mean of x x^T over the weighted tokens."""
        return self.inputs / max(self.weight, 1e-12)


def collect(model: MissVQA, batches: Iterable[VQABatch], wanted: Callable[[str], bool]) -> dict[str, Moments]:
    """Moments of the linear layers whose weights' names are wanted, over all batches, teacher-forced.

    The gradient is that of the answers' loss. Layers that no answer depends on keep empty moments.
    """
    layers = {name: layer for name, layer in linear_modules(model).items() if wanted(name)}
    moments = {name: Moments.empty(layer) for name, layer in layers.items()}
    handles = [layer.register_forward_hook(_watcher(moments[name])) for name, layer in layers.items()]
    for layer in layers.values():
        # The fused form does not go through the module's call, and so not through its hooks.
        layer.gelu = partial(_unfused_gelu, layer)  # type: ignore[method-assign]
    try:
        with _activations_only(model):
            for batch in batches:
                model(batch).loss_per_row.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            del layer.gelu
    return moments


@contextlib.contextmanager
def _activations_only(model: MissVQA) -> Iterator[None]:
    """Gradients of activations without those of weights, a third of the work: they start at each tower's entrance."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    encoder, decoder = model.encoder, model.decoder
    norms = (encoder.embeddings.norm.bias, decoder.embeddings.norm.bias)
    entrances = (model.vision.cls_token, encoder.cross_kv.bias, *norms)
    for parameter in before:
        parameter.requires_grad_(any(parameter is entrance for entrance in entrances))
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None


def _unfused_gelu(layer: Linear, x: Tensor, then: object = None) -> Tensor:
    return F.gelu(layer(x))


def _watcher(moments: Moments) -> Callable[[Linear, tuple[Tensor], Tensor], None]:
    def watch(layer: Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        output.register_hook(lambda gradient: moments.add(x, gradient.flatten(0, -2).float()))

    return watch
