"""Attention in plain PyTorch: the definition, forward and backward, that the fast ones must match.

Knows the formulas; does not know speed. Computes in float32 (float64 in float64), whatever autocast says.
Shapes: B batch, T queries, N keys, H heads, D head width.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from miss.kernels.dropout import keep_scale
from miss.kernels.registry import accumulator

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Runs `function` outside of autocast (of its first tensor's device): it chooses its dtypes itself."""

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def visible_keys(
    lengths: Tensor | None, causal: bool, num_queries: int, num_keys: int, device: torch.device
) -> Tensor | None:
    """bool (B or 1, 1, T or 1, N), True where a query sees a key; None where every query sees every key."""
    keys = torch.arange(num_keys, device=device)
    visible = None if lengths is None else keys < lengths.view(-1, 1, 1, 1)
    if causal and num_queries > 1:
        last = torch.arange(num_keys - num_queries, num_keys, device=device)
        below = (keys <= last[:, None])[None, None]
        visible = below if visible is None else visible & below
    return visible


def _scores(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    dtype = accumulator(q.dtype)
    scores = torch.einsum("bthd,bnhd->bhtn", q.to(dtype), k.to(dtype)) * scale
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor, visible: Tensor | None) -> Tensor:
    """exp(scores - lse); zeros in a row that sees nothing, NaN in one whose visible scores are all -inf."""
    p = torch.exp(scores - lse[..., None])
    return p if visible is None else p.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D) in q's dtype, lse (B, H, T)); `keep` is dropout's factor on the probabilities (B, H, T, N)."""
    scores = _scores(q, k, visible, scale)
    lse = torch.logsumexp(scores, -1)
    p = _probabilities(scores, lse, visible)
    p = p if keep is None else p * keep
    return torch.einsum("bhtn,bnhd->bthd", p, v.to(p.dtype)).to(q.dtype), lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    visible: Tensor | None,
    scale: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the accumulator's dtype."""
    p = _probabilities(_scores(q, k, visible, scale), lse, visible)
    dout = dout.to(p.dtype)
    dp = torch.einsum("bthd,bnhd->bhtn", dout, v.to(p.dtype))
    dropped = p if keep is None else p * keep
    dp = dp if keep is None else dp * keep
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bhtn,bnhd->bthd", ds, k.to(p.dtype))
    dk = torch.einsum("bhtn,bthd->bnhd", ds, q.to(p.dtype))
    return dq, dk, torch.einsum("bhtn,bthd->bnhd", dropped, dout)


def keep_of(seed: Tensor | None, shape: tuple[int, ...], dropout_p: float, like: Tensor) -> Tensor | None:
    """Dropout's factor on probabilities of `shape`, in the accumulator's dtype; None where nothing is dropped."""
    if dropout_p == 0.0:
        return None
    assert seed is not None, "dropout needs the seed that as_seed made"
    return keep_scale(seed, shape, dropout_p, like.device, accumulator(like.dtype))


@without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    visible = visible_keys(lengths, causal, q.shape[1], k.shape[1], q.device)
    return attend(q, k, v, visible, scale, keep_of(seed, shape, dropout_p, q))


@without_autocast
def backward(
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
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    visible = visible_keys(lengths, causal, q.shape[1], k.shape[1], q.device)
    grads = attend_backward(dout, q, k, v, lse, visible, scale, keep_of(seed, shape, dropout_p, q))
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


@without_autocast
def log_sum_exp(q: Tensor, k: Tensor, lengths: Tensor | None, causal: bool, scale: float) -> Tensor:
    """lse (B, H, T) alone, for implementations that do not keep it."""
    visible = visible_keys(lengths, causal, q.shape[1], k.shape[1], q.device)
    return torch.logsumexp(_scores(q, k, visible, scale), -1)


@without_autocast
def attention_probabilities(
    q: Tensor, k: Tensor, lengths: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """What each query (B, T, H, D) looks at: (B, H, T, N), float32 (float64 in float64), rows that sum to 1 (or to 0
    where nothing is visible). For explanations: it keeps the whole matrix."""
    visible = visible_keys(lengths, causal, q.shape[1], k.shape[1], q.device)
    scores = _scores(q, k, visible, q.shape[-1] ** -0.5 if scale is None else scale)
    return _probabilities(scores, torch.logsumexp(scores, -1), visible)


def _sequences(offsets: Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _keep_of_sequence(keep: Tensor | None, rows: slice) -> Tensor | None:
    """(total, H, max_length) -> (1, H, T, T) of one sequence."""
    if keep is None:
        return None
    return keep[rows, :, : rows.stop - rows.start].transpose(0, 1)[None]


@without_autocast
def varlen_forward(
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
    keep = keep_of(seed, (*q.shape[:2], max_length), dropout_p, q)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(q.shape[:2], dtype=accumulator(q.dtype))
    for rows in _sequences(offsets):
        length = rows.stop - rows.start
        visible = visible_keys(None, causal, length, length, q.device)
        one, one_lse = attend(
            q[None, rows], k[None, rows], v[None, rows], visible, scale, _keep_of_sequence(keep, rows)
        )
        out[rows], lse[rows] = one[0], one_lse[0].T
    return out, lse


@without_autocast
def varlen_backward(
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
    keep = keep_of(seed, (*q.shape[:2], max_length), dropout_p, q)
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    for rows in _sequences(offsets):
        length = rows.stop - rows.start
        visible = visible_keys(None, causal, length, length, q.device)
        dout_i, q_i, k_i, v_i = (t[None, rows] for t in (dout, q, k, v))
        keep_i = _keep_of_sequence(keep, rows)
        each = attend_backward(dout_i, q_i, k_i, v_i, lse[rows].T[None], visible, scale, keep_i)
        for grad, one in zip(grads, each, strict=True):
            grad[rows] = one[0].to(grad.dtype)
    return grads[0], grads[1], grads[2]
