"""Linear layers and embedding tables over packed int8 and int4 weights.

Knows the products, their gradient in x and who computes them; does not know how weights are packed (`packing.py`),
which layers are, or why.

    quant_linear, weight only:  y = x @ W.T + bias,  W = unpack(packed)
    quant_linear, W8A8:         s = max|x row| / 127;  q = round(x / s);  y = (q @ data.T) * s * scale + bias
    quant_linear, fp8:          as W8A8 with float8 (e4m3) numbers and 448 for 127 (`fp8.py`)
    quant_embedding:            y = W[ids]

x (…, K), y (…, N) in x's dtype; W (N, K); bias (N,) or None. Sums are float32 (float64 in float64); those of W8A8 are
int32 and exact, and each row's scale is its own, so that a row's result does not depend on what shares its batch. Under
autocast x and bias take the autocast dtype.

Gradient: dx = dy @ W and dbias = sum(dy), for W8A8 too (straight through the rounding of x); W has none. That is what
adapters over a packed model need.

Source: arXiv 2208.07339 (row-wise int8 activations), arXiv 2210.17323 (int4 groups).
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.quant_linear import limits, reference, torch_impl
from miss.kernels.quant_linear.fp8 import fp8_linear
from miss.kernels.quant_linear.library import library_linear
from miss.kernels.quant_linear.packing import LIBRARY, PackedWeight
from miss.kernels.registry import ALL_FLOATS, Impl, Op, autocast_to, lazy, triton

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})


def prepared_limits(x: Tensor, *rest: Any) -> str | None:
    """csrc/cpu reads panels, the last arguments; laying a weight out for one call would cost more than it gives."""
    return "the weight is not prepared (`prepare`)" if rest[-2] is None else None


def on_cpu(function: str) -> Impl:
    """The row of csrc/cpu."""
    run = lazy("quant_linear.cpu_impl", function)
    return Impl("cpu", run, device="cpu", dtypes=CPU_DTYPES, needs=extension.missing, limits=prepared_limits)


FORWARD = Op(
    "quant_linear",
    on_cpu("forward"),
    triton("quant_linear.triton_impl", "forward", limits.forward),
    # Not composite: autograd would keep every dequantised weight until backward.
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "quant_linear_backward",
    triton("quant_linear.triton_backward_impl", "backward", limits.backward),
    Impl("torch", torch_impl.backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.backward, dtypes=ALL_FLOATS),
)
DYNAMIC = Op(
    "quant_linear_w8a8",
    on_cpu("dynamic"),
    triton("quant_linear.triton_w8a8_impl", "dynamic", limits.dynamic),
    Impl("torch", torch_impl.dynamic, dtypes=ALL_FLOATS, limits=torch_impl.dynamic_limits),
    Impl("reference", reference.dynamic, dtypes=ALL_FLOATS),
)
# The scales come first: a table judges device and dtype by its first tensor, and ids are whole numbers.
EMBEDDING = Op(
    "quant_embedding",
    triton("quant_linear.triton_impl", "embedding", limits.embedding),
    Impl("torch", torch_impl.embedding, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.embedding, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::quant_linear", mutates_args=())
def _forward(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    columns: int,
    group: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    return FORWARD(x, data, scale, zero, bias, columns, group, panels, offset)


@_forward.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    columns: int,
    group: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@torch.library.custom_op("miss::quant_linear_w8a8", mutates_args=())
def _dynamic(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, panels: Tensor | None, offset: Tensor | None
) -> Tensor:
    return DYNAMIC(x, data, scale, bias, panels, offset)


@_dynamic.register_fake
def _(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, panels: Tensor | None, offset: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@torch.library.custom_op("miss::quant_linear_backward", mutates_args=())
def _backward(dy: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int) -> Tensor:
    return BACKWARD(dy, data, scale, zero, columns, group)


@_backward.register_fake
def _(dy: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], columns))


@torch.library.custom_op("miss::quant_embedding", mutates_args=())
def _embedding(
    scale: Tensor, data: Tensor, zero: Tensor | None, ids: Tensor, columns: int, group: int, dtype: torch.dtype
) -> Tensor:
    return EMBEDDING(scale, data, zero, ids, columns, group, dtype)


@_embedding.register_fake
def _(
    scale: Tensor, data: Tensor, zero: Tensor | None, ids: Tensor, columns: int, group: int, dtype: torch.dtype
) -> Tensor:
    return scale.new_empty((*ids.shape, columns), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, data, scale, zero, bias, ctx.columns, ctx.group, *_ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(data, scale, zero)


def _save_dynamic(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scale, bias, *_ = inputs
    ctx.columns, ctx.group = x.shape[-1], 0
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(data, scale, None)


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    data, scale, zero = ctx.saved_tensors
    dx = _backward(dy.contiguous(), data, scale, zero, ctx.columns, ctx.group)
    return dx, None if ctx.bias_dtype is None else dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias = _grads(ctx, dy)
    return dx, None, None, None, dbias, None, None, None, None


def _grad_dynamic(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias = _grads(ctx, dy)
    return dx, None, None, dbias, None, None


_forward.register_autograd(_grad, setup_context=_save)
_dynamic.register_autograd(_grad_dynamic, setup_context=_save_dynamic)


def quant_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (…, K) times a packed (N, K) weight, plus bias (N,) -> (…, N) in x's dtype.

    Raises:
        ValueError: x or bias does not fit the weight, or W8A8 is asked of an int4 weight.
    """
    num_outputs, columns = packed.shape
    if x.shape[-1] != columns or (bias is not None and bias.shape != (num_outputs,)):
        raise ValueError(
            f"quant_linear: x {tuple(x.shape)}, bias {None if bias is None else tuple(bias.shape)}; "
            f"a packed weight of {packed.shape} wants x (…, {columns}) and bias ({num_outputs},)"
        )
    x, bias = autocast_to(x, bias)
    if packed.scheme in LIBRARY:
        return library_linear(x, packed, bias)
    if packed.scheme == "fp8":
        return fp8_linear(x, packed, bias)
    panels, offset = packed.prepared or (None, None)
    if not packed.dynamic:
        args = (x, packed.data, packed.scale, packed.zero, bias, columns, packed.group, panels, offset)
        return FORWARD.call(_forward, *args)
    if packed.scheme != "int8":
        raise ValueError(f"quant_linear: int8 activations (dynamic) want an int8 weight, got {packed.scheme}")
    return DYNAMIC.call(_dynamic, x, packed.data, packed.scale, bias, panels, offset)


def prepare(packed: PackedWeight) -> PackedWeight:
    """`packed` with what the kernels for this CPU read in its place; unchanged where there are none, or it has it."""
    ours = packed.scheme in ("int8", "int4")
    if not ours or packed.prepared is not None or packed.data.device.type != "cpu" or extension.missing() is not None:
        return packed
    return lazy("quant_linear.cpu_impl", "prepared")(packed)


def quant_embedding(ids: Tensor, packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` (…) of a packed (V, C) table -> (…, C) in `dtype`. For inference: the table has no gradient."""
    args = (packed.scale, packed.data, packed.zero, ids, packed.shape[1], packed.group, dtype)
    return EMBEDDING.call(_embedding, *args)
