"""Cross-attention: rows of text over the keys and values of images (or of questions), by index.

Knows the contract, its gradient and who computes it; does not know what a source shows.

    out[r,t,h] = sum_n M[r,h,t,n] P[r,h,t,n] v[i,n,h]    P = softmax over n < lengths[i] of scale * q[r,t,h] . k[i,n,h]
    i = image_index[r]                                   M = dropout's mask / (1 - p); 1 without dropout
    lse[r,h,t] = log sum_n exp(scale * q . k)

A source is
    KV(k, v)                   k, v (I, N, H, D)
    Tokens(x, w_k, w_v, b_v)   x (I, N, C), w_k, w_v (H * D, C), b_v (H * D,) or None:  k = x w_k^T,  v = x w_v^T + b_v
                               k and v need not be made (absorbed form):
                               scale * q . k = scale * (q w_k) . x,    out = (M P x) w_v^T + b_v * sum_n M P
    A bias on k would add the same number to all scores of a query, which softmax cancels: there is none. lse is then
    that of the scores without it.

q, out (R, T, H, D); image_index int32 (R,), non-decreasing, in [0, I): images may have no rows, one, or many; lengths
int32 (I,): valid keys of each source; a source of length 0 gives its rows zeros, and takes no gradient. float16,
bfloat16, float32, float64, one dtype for all (never quantized: per-channel scales of an int8 w_k would lie on the axis
that the absorbed form sums over); any strides; sums in float32 (float64 in float64). Invisible keys must be finite;
NaN and infinity among the visible ones as in `attention`.
The mask of dropout is `miss.kernels.dropout`'s over (R, H, T, N), whatever the source.

An index that is not sorted or out of range is a ValueError on CPU. On CUDA finding out would wait for the device: there
it is the caller's word, and a wrong one gives an IndexError at best.

Gradient, with dP = M * (dout v^T):  dS = P * (dP - sum_n P dP);  dq = scale dS k
    KV:      dk[i] = sum over the rows r of image i of scale dS[r]^T q[r];   dv[i] = sum over them of (M P)[r]^T dout[r]
    Tokens:  dx = dk w_k + dv w_v;   dw_k = dk^T x;   dw_v = dv^T x;   db_v = sum of dv

Source: arXiv 1706.03762; the absorbed form as in arXiv 2405.04434 (multi-head latent attention).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.attention import limits
from miss.kernels.attention.reference import log_sum_exp
from miss.kernels.cross_attention import reference, torch_impl
from miss.kernels.dropout import Seed, as_seed
from miss.kernels.registry import ALL_FLOATS, Impl, Op, accumulator, autocast_to, lazy, triton


class KV(NamedTuple):
    """Keys and values of I sources, both (I, N, H, D)."""

    k: Tensor
    v: Tensor


class Tokens(NamedTuple):
    """Tokens x (I, N, C) and what makes keys and values of them: w_k, w_v (H * D, C), b_v (H * D,) or None."""

    x: Tensor
    w_k: Tensor
    w_v: Tensor
    b_v: Tensor | None


def _cpu(function: str, fits: Callable[..., str | None]) -> Impl:
    run = lazy("cross_attention.cpu_impl", function)
    return Impl("cpu", run, device="cpu", dtypes=limits.CPU_DTYPES, needs=extension.missing, limits=fits)


def _forward_fits(
    q: Tensor, k: Tensor, v: Tensor, image_index: Tensor, lengths: Tensor | None, scale: float, *_: Any
) -> str | None:
    return limits.misfit(scale, q, k, v)


def _backward_fits(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    *_: Any,
) -> str | None:
    return limits.misfit(scale, q, k, v)


def _triton_backward_fits(dout: Tensor, q: Tensor, *rest: Any) -> str | None:
    if dout.dtype != q.dtype:
        return f"takes one dtype for all, got {dout.dtype} and {q.dtype}"
    return _backward_fits(dout, q, *rest)


def _tokens_fits(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    _: Tensor | None,
) -> str | None:
    if x.shape[-1] % 64:
        return f"tokens are a multiple of 64 wide, got {x.shape[-1]}"
    if dropout_p:
        return "no dropout in the absorbed form: training keeps keys and values"
    if w_k.dtype != q.dtype or w_v.dtype != q.dtype or x.dtype != q.dtype or w_k.stride(1) != 1 or w_v.stride(1) != 1:
        return "weights and tokens must be of q's dtype, their rows dense"
    if b_v is not None and (b_v.dtype != q.dtype or not b_v.is_contiguous()):
        return "b_v must be of q's dtype and dense"
    return limits.misfit(scale, q) or ("a token's numbers must lie side by side" if x.stride(2) != 1 else None)


def _triton_tokens_fits(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    *_: Any,
) -> str | None:
    if not all(t is None or t.dtype == q.dtype for t in (x, w_k, w_v, b_v)):
        return "takes one dtype for all"
    if not x.shape[2]:
        return "needs at least one column"
    if x.stride(2) != 1:
        return "a token's numbers must lie side by side"
    return None if scale > 0 else f"scale must be above 0, got {scale}"


def _triton_tokens_backward_fits(
    dout: Tensor,
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    *_: Any,
) -> str | None:
    if dout.dtype != q.dtype:
        return f"takes one dtype for all, got {dout.dtype} and {q.dtype}"
    return _triton_tokens_fits(q, x, w_k, w_v, b_v, image_index, lengths, scale)


FORWARD = Op(
    "cross_attention",
    _cpu("kv_forward", _forward_fits),
    triton("cross_attention.triton_impl", "kv_forward", _forward_fits),
    Impl("torch", torch_impl.kv_forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.kv_forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "cross_attention_backward",
    _cpu("kv_backward", _backward_fits),
    triton("cross_attention.triton_backward_impl", "kv_backward", _triton_backward_fits),
    Impl("torch", torch_impl.kv_backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.kv_backward, dtypes=ALL_FLOATS),
)
TOKENS_FORWARD = Op(
    "cross_attention_tokens",
    _cpu("tokens_forward", _tokens_fits),
    triton("cross_attention.triton_tokens_impl", "tokens_forward", _triton_tokens_fits),
    Impl("torch", torch_impl.tokens_forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.tokens_forward, dtypes=ALL_FLOATS),
)
TOKENS_BACKWARD = Op(
    "cross_attention_tokens_backward",
    triton("cross_attention.triton_tokens_backward_impl", "tokens_backward", _triton_tokens_backward_fits),
    Impl("torch", torch_impl.tokens_backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.tokens_backward, dtypes=ALL_FLOATS),
)


def _new_lse(q: Tensor) -> Tensor:
    rows, queries, heads, _ = q.shape
    return q.new_empty((rows, heads, queries), dtype=accumulator(q.dtype))


@torch.library.custom_op("miss::cross_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = FORWARD(q, k, v, image_index, lengths, scale, dropout_p, seed)
    if lse is None:  # the torch row keeps none: SDPA's public function gives none
        valid = None if lengths is None else lengths[image_index]
        lse = log_sum_exp(q, k[image_index], valid, False, scale)
    return out.contiguous(), lse


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _new_lse(q)


@torch.library.custom_op("miss::cross_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = BACKWARD(dout, q, k, v, out, lse, image_index, lengths, scale, dropout_p, seed)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, image_index, lengths, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, *output, image_index, lengths, seed)


def _grad(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    return *_backward(dout, *tensors, ctx.scale, ctx.dropout_p, seed), None, None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)


@torch.library.custom_op("miss::cross_attention_tokens", mutates_args=())
def _tokens_forward(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = TOKENS_FORWARD(q, x, w_k, w_v, b_v, image_index, lengths, scale, dropout_p, seed)
    if lse is None:
        lse = reference.tokens_forward(q, x, w_k, w_v, None, image_index, lengths, scale, 0.0, None)[1]
    return out.contiguous(), lse


@_tokens_forward.register_fake
def _(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _new_lse(q)


@torch.library.custom_op("miss::cross_attention_tokens_backward", mutates_args=())
def _tokens_backward(
    dout: Tensor,
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *grads, db_v = TOKENS_BACKWARD(dout, q, x, w_k, w_v, b_v, out, lse, image_index, lengths, scale, dropout_p, seed)
    dq, dx, dw_k, dw_v = (g.contiguous() for g in grads)
    return (
        dq,
        dx,
        dw_k,
        dw_v,
        q.new_empty(0) if db_v is None else db_v.contiguous(),
    )  # the schema has no optional result


@_tokens_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dx, dw_k, dw_v = (t.new_empty(t.shape) for t in (q, x, w_k, w_v))
    return dq, dx, dw_k, dw_v, q.new_empty(0 if b_v is None else b_v.shape)


def _tokens_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, x, w_k, w_v, b_v, image_index, lengths, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, x, w_k, w_v, b_v, *output, image_index, lengths, seed)


def _tokens_grad(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    *grads, db_v = _tokens_backward(dout, *tensors, ctx.scale, ctx.dropout_p, seed)
    return *grads, None if tensors[4] is None else db_v, None, None, None, None, None


_tokens_forward.register_autograd(_tokens_grad, setup_context=_tokens_save)


def cross_attention(
    q: Tensor,
    source: KV | Tokens,
    image_index: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
) -> Tensor:
    """out (R, T, H, D) of q (R, T, H, D); row r reads source image_index[r].

    Args:
        source: KV or Tokens of I images. The choice is the caller's, for all rows alike.
        image_index: int32 (R,), non-decreasing.
        lengths: int32 (I,): keys 0 .. lengths[i] - 1 of source i are valid.
        scale: D ** -0.5 where None.
        seed: dropout's seed, an int or an int64 0-dim tensor; drawn where None and dropout_p > 0.

    Raises:
        ValueError: shapes that do not fit each other, an index unsorted or out of range (CPU), dropout_p not in [0, 1).
    """
    _check(q, source, image_index, lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rest = (image_index, lengths, scale, dropout_p, as_seed(seed, dropout_p))
    tensors = autocast_to(q, *source)
    if isinstance(source, KV):
        return FORWARD.call(_forward, *tensors, *rest)[0]
    return TOKENS_FORWARD.call(_tokens_forward, *tensors, *rest)[0]


def _check(q: Tensor, source: KV | Tokens, image_index: Tensor, lengths: Tensor | None) -> None:
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in source._asdict().items() if t is not None)
    if isinstance(source, KV):
        fits = source.k.dim() == 4 and source.k.shape == source.v.shape and q.shape[2:] == source.k.shape[2:]
        wanted = "k, v (I, N, H, D)"
    else:
        weight = (q.shape[-2] * q.shape[-1], source.x.shape[-1])
        fits = source.x.dim() == 3 and source.w_k.shape == source.w_v.shape == weight
        fits = fits and (source.b_v is None or source.b_v.shape == weight[:1])
        wanted = "x (I, N, C), w_k, w_v (H * D, C), b_v (H * D,)"
    if q.dim() != 4 or not fits:
        raise ValueError(f"cross_attention: got q {tuple(q.shape)}, {shapes}; wanted q (R, T, H, D), {wanted}")
    if image_index.shape != q.shape[:1]:
        raise ValueError(f"cross_attention: image_index is {tuple(image_index.shape)}; wanted ({q.shape[0]},)")
    if lengths is not None and lengths.shape != source[0].shape[:1]:
        raise ValueError(f"cross_attention: lengths is {tuple(lengths.shape)}; wanted ({source[0].shape[0]},)")
