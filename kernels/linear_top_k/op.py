"""The language-model head of inference: a linear layer of which only the largest outputs and the log-sum-exp are kept.

Knows its formula and who computes it; does not know tokens, or which of them is chosen.

    z = hidden @ weight.T + bias;   values, indices = the k largest of z, descending;   lse = log(sum(exp(z)))

hidden (R, C), weight (V, C), bias (V,) or None, of one dtype (under autocast all take the autocast dtype); values
float32 (R, k), indices int64 (R, k), lse float32 (R,): float64 in float64. The log-softmax of a best token is value -
lse. Of equal values the lower index comes first. With a packed int8 weight that asks for int8 activations (W8A8), z is
`quant_linear`'s. For inference: there is no gradient.

The `cpu` and `triton` rows compute z in float32, keep none of it, and give bitwise the same whatever shares the batch
(`cpu`: and for any number of threads); a row with NaN among its z has lse NaN, values NaN and indices 0 … k - 1
(PyTorch's rows: NaN counts as the largest). `cpu` wants the weight in panels, made once for every call:
`linear.prepare`, `quant_linear.prepare`.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.linear.op import of_dtype
from miss.kernels.linear_top_k import reference, torch_impl
from miss.kernels.quant_linear import PackedWeight
from miss.kernels.quant_linear import limits as quant_limits
from miss.kernels.quant_linear.torch_impl import dynamic_limits
from miss.kernels.registry import ALL_FLOATS, FLOATS, Impl, Op, accumulator, autocast_to, lazy, triton

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})
MOST_K = 16  # csrc/cpu/top_k.h; in Triton each is a pass over a tile in registers
MOST_WORDS = 2**20  # of which a Triton program holds one number for 64
# Packing (30524, 768) takes 22 ms in bfloat16, most of it for new pages of memory: 64 rows then take 32 ms beside the
# torch row's 20, 200 rows 55 beside 83; in float32 64 and 53, 112 and 134.
ROWS_WORTH_PACKING = 128


def _limits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, panels: Tensor | None, *_: object
) -> str | None:
    if k > MOST_K:
        return f"takes k up to {MOST_K}, got {k}"
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype not in CPU_DTYPES):
        return "takes hidden and weight of one dtype, and a float32 or bfloat16 bias"
    if hidden.shape[1] == 0:
        return "needs at least one column"
    if panels is None and len(hidden) < ROWS_WORTH_PACKING:
        return f"the weight is not prepared (`prepare`): not for fewer than {ROWS_WORTH_PACKING} rows"
    return None


def _quant_limits(
    hidden: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, k: int, panels: Tensor | None, *_: object
) -> str | None:
    return _limits(hidden, hidden, bias, k, panels)


def _triton_limits(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, *_: object) -> str | None:
    if weight.dtype != hidden.dtype:
        return f"takes hidden and weight of one dtype, got {hidden.dtype} and {weight.dtype}"
    return _head_limits(hidden, len(weight), bias, k)


def _triton_quant_limits(
    hidden: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, k: int, *_: object
) -> str | None:
    return quant_limits.dynamic(hidden, data, scale, bias, None, None) or _head_limits(hidden, len(scale), bias, k)


def _head_limits(hidden: Tensor, num_words: int, bias: Tensor | None, k: int) -> str | None:
    if k > MOST_K:
        return f"takes k up to {MOST_K}, got {k}"
    if num_words > MOST_WORDS:
        return f"takes up to {MOST_WORDS:,} words, got {num_words:,}"
    if bias is not None and bias.dtype not in FLOATS:
        return f"takes a bias of float32, float16 or bfloat16, got {bias.dtype}"
    return None if hidden.shape[1] else "needs at least one column"


def _cpu(function: str, limits: Any) -> Impl:
    run = lazy("linear_top_k.cpu_impl", function)
    return Impl("cpu", run, device="cpu", dtypes=CPU_DTYPES, needs=extension.missing, limits=limits)


FORWARD = Op(
    "linear_top_k",
    _cpu("forward", _limits),
    triton("linear_top_k.triton_impl", "forward", _triton_limits),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
QUANT = Op(
    "linear_top_k_w8a8",
    _cpu("quant", _quant_limits),
    triton("linear_top_k.triton_impl", "quant", _triton_quant_limits),
    Impl("torch", torch_impl.quant, dtypes=ALL_FLOATS, limits=dynamic_limits),
    Impl("reference", reference.quant, dtypes=ALL_FLOATS),
)


def _outputs(hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values = hidden.new_empty(hidden.shape[0], k, dtype=accumulator(hidden.dtype))
    return values, torch.empty_like(values, dtype=torch.int64), values.new_empty(hidden.shape[0])


@torch.library.custom_op("miss::linear_top_k", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, panels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return FORWARD(hidden, weight, bias, k, panels)


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, panels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden, k)


@torch.library.custom_op("miss::linear_top_k_w8a8", mutates_args=())
def _quant(
    hidden: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return QUANT(hidden, data, scale, bias, k, panels, offset)


@_quant.register_fake
def _(
    hidden: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden, k)


def linear_top_k(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    k: int,
    panels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, indices, lse) of hidden (R, C) and weight (V, C), plain or packed for W8A8.

    Args:
        panels: `linear.prepare(weight)` of a plain weight; a packed one has its own (`quant_linear.prepare`).

    Raises:
        ValueError: shapes that do not fit each other, k not in 1 … V, or a packed weight that is not W8A8.
    """
    num_tokens, width = weight.shape
    if hidden.dim() != 2 or hidden.shape[1] != width or (bias is not None and bias.shape != (num_tokens,)):
        raise ValueError(
            f"linear_top_k: hidden {tuple(hidden.shape)}, bias {None if bias is None else tuple(bias.shape)}; "
            f"a weight of {tuple(weight.shape)} wants hidden (R, {width}) and bias ({num_tokens},)"
        )
    if not 1 <= k <= num_tokens:
        raise ValueError(f"linear_top_k: k is {k}; wanted 1 … {num_tokens}")
    if isinstance(weight, PackedWeight):
        if not weight.dynamic or weight.scheme != "int8":
            raise ValueError(
                "linear_top_k: a packed weight is wanted with int8 activations (W8A8); else use quant_linear"
            )
        hidden, bias = autocast_to(hidden, bias)
        prepared = weight.prepared or (None, None)
        return QUANT.call(_quant, hidden, weight.data, weight.scale, bias, k, *prepared)
    hidden, weight, bias = autocast_to(hidden, weight, bias)
    return FORWARD.call(_forward, hidden, weight, bias, k, of_dtype(panels, hidden))
