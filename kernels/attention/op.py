"""Self-attention over padded batches and over packed sequences.

Knows the contract, its gradient and who computes it; does not know which tower asks.

    out[b,t,h] = sum_n M[b,h,t,n] P[b,h,t,n] v[b,n,h]      P = softmax over the visible n of scale * q[b,t,h] . k[b,n,h]
    lse[b,h,t] = log sum_n exp(scale * q . k)              M = dropout's mask / (1 - p); 1 without dropout

q, out (B, T, H, D); k, v (B, N, H, D); float16, bfloat16, float32, float64, one dtype for all; any strides, as views of
a packed (B, N, 3, H, D) projection have. Sums in float32 (float64 in float64).
Visible to a query t: keys n < lengths[b] where lengths are given, for every query, also for those past the length; with
`causal`, of those n <= t + (N - T): the last query sees all. A query that sees nothing gives zeros, lse -inf, and takes
and gives no gradient. What stands in invisible keys and values must be finite: it is multiplied by zero (the `cpu` row
never reads those past a length). A NaN among a query's visible scores, an infinite one, or none above -inf makes that
query's output NaN in its head, as torch.softmax does; a score of -inf beside others has weight 0. (PyTorch's and other
libraries' rows do as their kernels do where no visible score is above -inf: SDPA on CPU gives zeros in float32, and in
bfloat16 a mean of the values.)
Packed: q, k, v (total, H, D), sequence i is rows offsets[i] .. offsets[i+1]; lse (total, H).
The mask of dropout is `miss.kernels.dropout`'s over (B, H, T, N); packed, over (total, H, max_length).

Gradient, with dP = M * (dout v^T): dS = P * (dP - sum_n P dP);  dq = scale dS k;  dk = scale dS^T q;  dv = (M P)^T dout
    (sum_n P dP = dout . out, so that a backward needs no more than q, k, v, out and lse)

Source: arXiv 1706.03762; backward from lse as in arXiv 2205.14135.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.attention import libraries, limits, reference, torch_impl
from miss.kernels.dropout import Seed, as_seed
from miss.kernels.registry import ALL_FLOATS, Impl, Op, accumulator, autocast_to, lazy, triton


def _cpu(function: str, fits: Callable[..., str | None]) -> Impl:
    run = lazy("attention.cpu_impl", function)
    return Impl("cpu", run, device="cpu", dtypes=limits.CPU_DTYPES, needs=extension.missing, limits=fits)


FORWARD = Op(
    "attention",
    triton("attention.triton_impl", "forward", limits.triton_forward),
    _cpu("forward", limits.forward),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS, composite=True),
    *libraries.BELOW,
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "attention_backward",
    triton("attention.triton_backward_impl", "backward", limits.triton_backward),
    _cpu("backward", limits.backward),
    Impl("torch", torch_impl.backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.backward, dtypes=ALL_FLOATS),
)
VARLEN_FORWARD = Op(
    "attention_varlen",
    triton("attention.triton_impl", "varlen_forward", limits.triton_varlen_forward),
    _cpu("varlen_forward", limits.varlen_forward),
    *libraries.VARLEN_ABOVE,
    Impl("torch", torch_impl.varlen_forward, dtypes=ALL_FLOATS, composite=True),
    *libraries.VARLEN_BELOW,
    Impl("reference", reference.varlen_forward, dtypes=ALL_FLOATS),
)
VARLEN_BACKWARD = Op(
    "attention_varlen_backward",
    triton("attention.triton_backward_impl", "varlen_backward", limits.triton_varlen_backward),
    _cpu("varlen_backward", limits.varlen_backward),
    Impl("torch", torch_impl.varlen_backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.varlen_backward, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = FORWARD(q, k, v, lengths, causal, scale, dropout_p, seed)
    # The torch row keeps no lse: SDPA's public function gives none.
    return out.contiguous(), reference.log_sum_exp(q, k, lengths, causal, scale) if lse is None else lse


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=accumulator(q.dtype))


@torch.library.custom_op("miss::attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = BACKWARD(dout, q, k, v, out, lse, lengths, causal, scale, dropout_p, seed)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, lengths, ctx.causal, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, *output, lengths, seed)


def _grad(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lengths, seed = ctx.saved_tensors
    grads = _backward(dout, *tensors, lengths, ctx.causal, ctx.scale, ctx.dropout_p, seed)
    return *grads, None, None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)


@torch.library.custom_op("miss::attention_varlen", mutates_args=())
def _varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = VARLEN_FORWARD(q, k, v, offsets, max_length, causal, scale, dropout_p, seed)
    if lse is None:
        lse = reference.varlen_forward(q, k, v, offsets, max_length, causal, scale, 0.0, None)[1]
    return out.contiguous(), lse


@_varlen_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))


@torch.library.custom_op("miss::attention_varlen_backward", mutates_args=())
def _varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = VARLEN_BACKWARD(dout, q, k, v, out, lse, offsets, max_length, causal, scale, dropout_p, seed)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_varlen_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _varlen_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, offsets, ctx.max_length, ctx.causal, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, seed)


def _varlen_grad(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, offsets, seed = ctx.saved_tensors
    grads = _varlen_backward(dout, *tensors, offsets, ctx.max_length, ctx.causal, ctx.scale, ctx.dropout_p, seed)
    return *grads, None, None, None, None, None, None


_varlen_forward.register_autograd(_varlen_grad, setup_context=_varlen_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
) -> Tensor:
    """out (B, T, H, D) of q (B, T, H, D) over k, v (B, N, H, D).

    Args:
        lengths: int32 (B,): keys 0 .. lengths[b] - 1 are valid; a row of length 0 gives zeros.
        scale: D ** -0.5 where None.
        seed: dropout's seed, an int or an int64 0-dim tensor; drawn where None and dropout_p > 0.

    Raises:
        ValueError: shapes that do not fit each other, causal with more queries than keys, dropout_p not in [0, 1).
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (*q.shape[:1], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"attention: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "wanted (B, T, H, D), (B, N, H, D), (B, N, H, D)"
        )
    if lengths is not None and lengths.shape != q.shape[:1]:
        raise ValueError(f"attention: lengths is {tuple(lengths.shape)}; wanted one a row, ({q.shape[0]},)")
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"causal attention: {q.shape[1]} queries over {k.shape[1]} keys; wanted no more than the keys")
    q, k, v = autocast_to(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return FORWARD.call(_forward, q, k, v, lengths, causal, scale, dropout_p, as_seed(seed, dropout_p))[0]


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
) -> Tensor:
    """out (total, H, D) of packed q, k, v (total, H, D): each sequence attends to itself alone.

    Args:
        offsets: int32 (B + 1,), from 0 to total, non-decreasing; sequence i is rows offsets[i] .. offsets[i + 1].
        max_length: no sequence is longer; on CPU this is checked, on CUDA it is the caller's word.

    Raises:
        ValueError: shapes that do not fit each other, offsets that are not as said (CPU), dropout_p not in [0, 1).
    """
    if q.dim() != 3 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"attention_varlen: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted (total, H, D)"
        )
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"attention_varlen: offsets is {tuple(offsets.shape)}; wanted (B + 1,)")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_offsets(offsets.tolist(), q.shape[0], max_length)
    q, k, v = autocast_to(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (q, k, v, offsets, max_length, causal, scale, dropout_p, as_seed(seed, dropout_p))
    return VARLEN_FORWARD.call(_varlen_forward, *args)[0]


def _check_offsets(offsets: list[int], total: int, max_length: int) -> None:
    lengths = [b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    if offsets[0] != 0 or offsets[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"attention_varlen: offsets {offsets}; wanted them to rise from 0 to {total}, the rows of q")
    if max(lengths, default=0) > max_length:
        raise ValueError(f"attention_varlen: a sequence of {max(lengths)} rows; max_length is {max_length}")
