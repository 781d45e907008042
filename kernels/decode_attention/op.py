"""Attention of one new token a row against the slot cache.

Knows the contract and who computes it; does not know who owns a slot.

    out[r,h] = sum_n P[r,h,n] v_cache[s,n,h]      P = softmax over n < lengths[r] of scale * q[r,h] . k_cache[s,n,h]
    s = slots[r]

q, out (R, H, D); k_cache, v_cache (S, L, H, D), any strides; slots int32 (R,), rows may share one; lengths int32 (R,):
valid positions of the slot, the new token's included; 0 gives zeros. float16, bfloat16, float32, float64, one dtype for
all; sums in float32 (float64 in float64). Invisible positions must hold finite numbers: they are multiplied by zero.
NaN and infinity at visible ones as in `attention`.
slots in [0, S) and lengths in [0, L] are the caller's word: reading them on the host would wait for a CUDA device.

No gradient: decoding is never trained through.
"""

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.attention import limits
from miss.kernels.decode_attention import reference, torch_impl
from miss.kernels.registry import ALL_FLOATS, Impl, Op, autocast_to, lazy, triton


def _fits(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> str | None:
    return limits.misfit(scale, q, k_cache, v_cache)


FORWARD = Op(
    "decode_attention",
    Impl(
        "cpu",
        lazy("decode_attention.cpu_impl", "forward"),
        device="cpu",
        dtypes=limits.CPU_DTYPES,
        needs=extension.missing,
        limits=_fits,
    ),
    triton("decode_attention.triton_impl", "forward", _fits),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::decode_attention", mutates_args=())
def _forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return FORWARD(q, k_cache, v_cache, slots, lengths, scale).contiguous()


@_forward.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """out (R, H, D) of q (R, H, D) over the caches' slots (S, L, H, D).

    Args:
        slots: int32 (R,): the row's slot.
        lengths: int32 (R,): its valid positions, the new one included.
        scale: D ** -0.5 where None.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or q.shape[1:] != k_cache.shape[2:]:
        raise ValueError(
            f"decode_attention: got q {tuple(q.shape)}, caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; "
            "wanted (R, H, D), (S, L, H, D) twice"
        )
    if not slots.shape == lengths.shape == q.shape[:1]:
        raise ValueError(
            f"decode_attention: slots {tuple(slots.shape)}, lengths {tuple(lengths.shape)}; wanted ({q.shape[0]},)"
        )
    # The cache keeps its dtype: casting it to the autocast dtype would copy all of it at every step.
    (q,) = autocast_to(q, dtype=k_cache.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return FORWARD.call(_forward, q, k_cache, v_cache, slots, lengths, scale)
