"""Outlier channels made smaller before activations are rounded to int8, by numbers that the layer before takes up.

Knows which layers of the model stand behind something that is linear in each channel (a norm, an attention's values),
and what rounding costs there; does not know files, schemes or answers.

    y = W x = (W diag(s)) (diag(1 / s) x),    s = largest(x)^alpha / largest(column of W)^(1 - alpha), mean 1

1 / s goes into the norm's weight and bias, or into the rows of the product that makes the values: exact, but for
rounding, and free when the model runs. Behind GELU and in post-norm layers, whose norm is also the residual, there is
nothing that could take it up.

Source: arXiv 2211.10438 (SmoothQuant); alpha is chosen for each layer by the error of its outputs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from miss.engine.runtime.calibration import Moments
from miss.kernels.quant_linear import PackedWeight, dequantise_rows, pack_fp8, pack_int8, quantise_rows, unpack
from miss.models.layers import CrossAttention, SelfAttention
from miss.models.vision import VisionBlock
from miss.models.vqa import MissVQA

ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)
_WORTH = 0.98  # of the error without smoothing: less than 2 % gained is noise of the sample


@dataclass(frozen=True)
class Fold:
    """A layer whose inputs can be scaled: `layer` names its weight, `sources` the tensors that take up 1 / s: their
    first dimension's rows from `start` on, one a channel."""

    layer: str
    sources: tuple[str, ...]
    start: int = 0


def folds(model: MissVQA) -> Iterator[Fold]:
    """Every layer whose inputs can be scaled, in the order in which they run."""
    for name, module in model.named_modules():
        if isinstance(module, VisionBlock):
            for norm, layer in (("norm1", "attention.qkv"), ("norm2", "mlp.input")):
                yield Fold(f"{name}.{layer}.weight", (f"{name}.{norm}.weight", f"{name}.{norm}.bias"))
        elif isinstance(module, SelfAttention):
            sources = (f"{name}.qkv.weight", f"{name}.qkv.bias")
            yield Fold(f"{name}.output.weight", sources, 2 * module.output.in_features)
        elif isinstance(module, CrossAttention):
            tower, _, number, _ = name.split(".")
            start = (2 * int(number) + 1) * module.output.in_features
            yield Fold(f"{name}.output.weight", (f"{tower}.cross_kv.weight", f"{tower}.cross_kv.bias"), start)


def smooth_scale(weight: Tensor, sample: Tensor, alpha: float) -> Tensor:
    """s (K,) for a weight (N, K) and inputs (n, K); 1 for channels that are always zero."""
    largest, columns = sample.abs().amax(0), weight.abs().amax(0)
    known = (largest > 0) & (columns > 0)
    s = torch.where(known, largest.clamp_min(1e-9) ** alpha / columns.clamp_min(1e-9) ** (1 - alpha), 1.0)
    return torch.where(known, s / s[known].log().mean().exp(), 1.0) if known.any() else s


def choose_scale(weight: Tensor, sample: Tensor, outputs: Tensor | None = None) -> tuple[Tensor | None, float]:
    """The scale that leaves the least error in W8A8 outputs, and its alpha; None and 0 where none is worth it."""
    if not len(sample):
        return None, 0.0
    best, scale, chosen = _WORTH * w8a8_error(weight, sample, outputs), None, 0.0
    for alpha in ALPHAS:
        s = smooth_scale(weight, sample, alpha)
        error = w8a8_error(weight * s, sample / s, outputs)
        if error < best:
            best, scale, chosen = error, s, alpha
    return scale, chosen


def w8a8_error(weight: Tensor, sample: Tensor, outputs: Tensor | None = None) -> float:
    """The relative error of a layer's outputs, root mean square, when weight and inputs are rounded to int8; `outputs`
    (N,) is what a squared error of each output counts."""
    error, size = rounding_errors(weight, sample)
    counts = torch.ones_like(error) if outputs is None else outputs
    return float(((error * counts).sum() / (size * counts).sum().clamp_min(1e-30)).sqrt())


def rounding_errors(
    weight: Tensor, sample: Tensor, packed: PackedWeight | None = None, dynamic: bool = True
) -> tuple[Tensor, Tensor]:
    """Each output's mean squared error (N,), and its mean square, over inputs (n, K).

    Args:
        weight: (N, K) before rounding. packed: what became of it; None rounds it to int8 by rows.
        dynamic: whether the inputs are rounded, too: to int8, for an fp8 weight to float8.
    """
    weight = weight.detach()
    rounded = unpack(pack_int8(weight) if packed is None else packed)
    seen = sample
    if dynamic and packed is not None and packed.scheme == "fp8":
        seen = unpack(pack_fp8(sample))  # a row of inputs is rounded as a row of weights is
    elif dynamic:
        seen = dequantise_rows(quantise_rows(sample))
    wanted = sample @ weight.T
    return (seen @ rounded.T - wanted).square().mean(0), wanted.square().mean(0)


def smooth(model: MissVQA, tensors: Mapping[str, Tensor], moments: dict[str, Moments]) -> dict[str, float]:
    """Scales every layer where that pays, in place in `tensors` (which the model's may be) and in `moments`.

    Returns:
        The alphas by layer.
    """
    alphas = {}
    for fold in folds(model):
        seen = moments.get(fold.layer)
        if seen is None or not seen.tokens:
            continue
        scale, alpha = choose_scale(tensors[fold.layer], seen.sample, seen.outputs)
        if scale is None:
            continue
        alphas[fold.layer] = alpha
        apply_fold(tensors, fold, scale)
        moments[fold.layer] = seen.scaled(scale)
        source = moments.get(fold.sources[0])
        if source is not None:  # values that are smaller by s count more by s
            source.outputs[fold.start : fold.start + len(scale)] *= scale.square()
    return alphas


def apply_fold(tensors: Mapping[str, Tensor], fold: Fold, scale: Tensor) -> None:
    """Multiplies the layer's columns and divides what makes its inputs, in place."""
    tensors[fold.layer].mul_(scale)
    rows = slice(fold.start, fold.start + len(scale))
    for name in fold.sources:
        tensors[name][rows].div_(scale if tensors[name].dim() == 1 else scale[:, None])
