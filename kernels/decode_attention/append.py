"""Decode attention whose new tokens come along: their keys and values are written to the cache and attended to.

Knows the contract and who computes it; does not know who owns a slot.

    cache[slots[r], positions[r]] = (k[r], v[r]) for all rows;   out = decode_attention over positions[r] + 1 positions

q, out (R, H, D) of the caches' dtype; k, v (R, H, D), cast to it; caches (S, L, H, D), any strides; slots, positions
int32 (R,). Rows may be of one slot where they stand one behind another at successive positions: each then sees those
before it. (slot, position) pairs are distinct. Otherwise as `kv_append` and `decode_attention`, whose results one after
the other are this one's: `composed` is that, and each of the two chooses its own row. No gradient.
"""

import torch
from torch import Tensor

from miss.kernels.attention import limits
from miss.kernels.decode_attention import reference
from miss.kernels.decode_attention.op import FORWARD
from miss.kernels.kv_cache import op as cache
from miss.kernels.kv_cache import reference as kv_cache
from miss.kernels.registry import ALL_FLOATS, FLOATS, Impl, Op, autocast_to, triton


def _fits(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> str | None:
    if not {k.dtype, v.dtype} <= FLOATS:
        return f"takes float32, float16 and bfloat16 rows, got {k.dtype} and {v.dtype}"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return "a head's numbers must lie side by side"
    return limits.misfit(scale, q, k_cache, v_cache)


def _composed(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    cache.APPEND(k_cache, v_cache, k, v, slots, positions)
    return FORWARD(q, k_cache, v_cache, slots, positions + 1, scale)  # type: ignore[no-any-return]


def _reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    kv_cache.append(k_cache, v_cache, k, v, slots, positions)
    return reference.forward(q, k_cache, v_cache, slots, positions + 1, scale)


APPEND = Op(
    "decode_attention_append",
    triton("decode_attention.triton_impl", "append", _fits),
    Impl("composed", _composed, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", _reference, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::decode_attention_append", mutates_args=("k_cache", "v_cache"))
def _append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    return APPEND(q, k, v, k_cache, v_cache, slots, positions, scale).contiguous()


@_append.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape)


def decode_attention_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float | None = None,
) -> Tensor:
    """out (R, H, D) of q (R, H, D) over the caches' slots (S, L, H, D) and the new k and v, which are stored there.

    Args:
        slots: int32 (R,): the row's slot.
        positions: int32 (R,): the new token's position, the last that it sees.
        scale: D ** -0.5 where None.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if not q.dim() == 3 or not q.shape == k.shape == v.shape or q.shape[1:] != k_cache.shape[2:]:
        raise ValueError(
            f"decode_attention_append: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, caches "
            f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}; wanted (R, H, D) three times, (S, L, H, D) twice"
        )
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape or not slots.shape == positions.shape == q.shape[:1]:
        raise ValueError(
            f"decode_attention_append: caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}, slots "
            f"{tuple(slots.shape)}, positions {tuple(positions.shape)}; wanted (S, L, H, D) twice, "
            f"({q.shape[0]},) twice"
        )
    (q,) = autocast_to(q, dtype=k_cache.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = _append if torch.compiler.is_compiling() else APPEND
    return run(q, k.detach(), v.detach(), k_cache, v_cache, slots, positions, scale)  # type: ignore[no-any-return]
