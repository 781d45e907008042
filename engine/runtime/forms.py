"""In which form each linear layer is packed: what a form costs in bytes and in error, and which is worth it.

Knows weights, what their layers saw and byte budgets; does not know models, files or how bytes are packed.

Forms, from the smallest: int4-128, int4-64, int4-32 (groups), nf4, int8 (weights alone), w8a8 (int8 weights and
activations), fp8 (float8 weights and activations), llm-int8, bf16 (kept as it is).
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miss.engine.runtime.calibration import Moments
from miss.engine.runtime.compensate import output_error, pack_int4_compensated, pack_int8_compensated
from miss.engine.runtime.smoothing import rounding_errors
from miss.kernels.quant_linear import PackedWeight, pack_fp8, pack_int4, pack_int8, pack_llm_int8, pack_nf4, unpack

FORMS = ("int4-128", "int4-64", "int4-32", "int8")  # that a byte budget chooses from, to the most exact
_SAMPLED_ROWS = 48  # of a matrix, that its forms are compared on


class QuantizeError(ValueError):
    """A checkpoint that cannot be packed as asked."""


@dataclass
class _Layer:
    """A linear layer's forms from the smallest to the most exact, with the bytes and the error of each."""

    name: str
    forms: list[str]
    sizes: list[int]
    errors: list[float]
    level: int = 0

    def offer(self) -> "tuple[float, int] | None":
        """The finer form that saves the most error for a byte more: (error a byte, level)."""
        here = self.level
        offers = [
            ((self.errors[here] - self.errors[k]) / (self.sizes[k] - self.sizes[here]), k)
            for k in range(here + 1, len(self.forms))
        ]
        return max(offers, default=None)


def within_budget(
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    moments: Mapping[str, Moments],
    budget: int | None,
    fixed: int,
) -> dict[str, str]:
    """The form of every layer: each gets what saves the most error for its bytes, until `budget` is spent.

    Args:
        fixed: bytes of all other tensors.

    Raises:
        QuantizeError: the budget is too small for any form.
    """
    layers = [_layer(name, tensors[name], moments.get(name)) for name in names]
    smallest = fixed + sum(layer.sizes[0] for layer in layers)
    if budget is not None and smallest > budget:
        raise QuantizeError(f"budget: got {budget:,} bytes for tensors; wanted at least {smallest:,}")
    left = float("inf") if budget is None else budget - smallest
    # Best offer first; the number breaks ties, so that layers are never compared.
    heap = [(-offer[0], i, offer[1]) for i, layer in enumerate(layers) if (offer := layer.offer())]
    heapq.heapify(heap)
    while heap:
        rank, i, level = heapq.heappop(heap)
        layer = layers[i]
        cost = layer.sizes[level] - layer.sizes[layer.level]
        if cost <= left:
            left -= cost
            layer.level = level
            if offer := layer.offer():
                heapq.heappush(heap, (-offer[0], i, offer[1]))
        elif level - 1 > layer.level:
            heapq.heappush(heap, (rank, i, level - 1))
    return {layer.name: layer.forms[layer.level] for layer in layers}


def _layer(name: str, weight: Tensor, moments: Moments | None) -> _Layer:
    forms = [form for form, size in _useful(weight)]
    sizes = [size for form, size in _useful(weight)]
    return _Layer(name, forms, sizes, [_error(weight, form, moments) for form in forms])


def _useful(weight: Tensor) -> list[tuple[str, int]]:
    """The forms that no more exact one undercuts, with their bytes: a narrow matrix fills no wide group."""
    kept: list[tuple[str, int]] = []
    for form in reversed(FORMS):
        size = form_bytes(weight, form)
        if not kept or size < kept[-1][1]:
            kept.append((form, size))
    return kept[::-1]


def form_bytes(weight: Tensor, form: str) -> int:
    """Bytes of a packed matrix."""
    rows, columns = weight.shape[0], weight[0].numel()
    if form == "int8":
        return rows * columns + 4 * rows
    group = int(form.removeprefix("int4-"))
    num_groups = -(-columns // group)
    return rows * num_groups * (group // 2 + 2)


def _error(weight: Tensor, form: str, moments: Moments | None) -> float:
    """What a form costs: the loss's rise to second order where that is known, else the relative squared error."""
    matrix = weight.flatten(1).float()
    rows = torch.linspace(0, len(matrix) - 1, min(_SAMPLED_ROWS, len(matrix))).long()  # all would take minutes
    sample = matrix[rows]
    packed = unpack(pack(sample, form, moments, compensate=False))
    if moments is None or moments.tokens == 0:
        return float((packed - sample).square().sum() / sample.square().sum().clamp_min(1e-30)) * matrix.numel()
    error = output_error(sample, packed, moments.hessian, moments.outputs[rows])
    return error * len(matrix) / len(rows)


def pack(weight: Tensor, form: str, moments: Moments | None, compensate: bool) -> PackedWeight:
    """A weight (N, …) in a form; where its layer's moments are known, for the least error of its outputs.

    Raises:
        ImportError: bitsandbytes, which the form needs, is not installed.
    """
    matrix = weight.flatten(1)
    seen = moments if moments is not None and moments.tokens > 0 else None
    if form in ("nf4", "llm-int8"):
        return pack_nf4(matrix) if form == "nf4" else pack_llm_int8(matrix)
    if form == "fp8":  # steps grow with the numbers, so that compensation, which wants equal ones, is left out
        return pack_fp8(matrix)
    if form in ("int8", "w8a8"):
        if seen is not None and seen.suffices and compensate:
            return pack_int8_compensated(matrix, seen.hessian, form == "w8a8")
        return pack_int8(matrix, form == "w8a8")
    group = int(form.removeprefix("int4-"))
    if seen is None:
        return pack_int4(matrix, group)
    if compensate:
        return pack_int4_compensated(matrix, seen.hessian, group)
    return pack_int4(matrix, group, importance=seen.hessian.diagonal())


@dataclass(frozen=True)
class Cost:
    """What W8A8 costs a layer's answers, and what more exact activations would cost in time.

    effect: the loss's rise to second order, over the calibration rows. products: multiplications for one answer.
    """

    effect: float
    products: float


def with_int8_activations(
    tensors: Mapping[str, Tensor], moments: Mapping[str, Moments], num_images: int, num_rows: int, share: float
) -> dict[str, str]:
    """w8a8 for every layer but those whose activations lose the most for what they cost: at most `share` of all
    products. Those keep their activations: a decoder's layer, which is read for one token at a time, as int8 (the
    bytes count, and they are the same), any other as bf16.

    Args:
        moments: of every layer; without any, all are w8a8.
    """
    forms = dict.fromkeys(tensors, "w8a8")
    costs = {
        name: _cost(name, tensors[name], found, num_images, num_rows)
        for name, found in moments.items()
        if name in forms and found.tokens
    }
    left = share * sum(cost.products for cost in costs.values())
    for name in sorted(costs, key=lambda name: -costs[name].effect / costs[name].products):
        if costs[name].products <= left:
            left -= costs[name].products
            forms[name] = "int8" if name.startswith("decoder.") else "bf16"
    return forms


def _cost(name: str, weight: Tensor, moments: Moments, num_images: int, num_rows: int) -> Cost:
    calls = num_images if name.startswith("vision.") or name == "encoder.cross_kv.weight" else num_rows
    squared, _ = rounding_errors(weight, moments.sample)
    return Cost(float((squared * moments.outputs).sum()), weight.numel() * moments.tokens / max(calls, 1))
