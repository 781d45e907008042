"""Writing to the slot cache, in place: append one token a row, reorder slots for beams.

Knows where a row goes; does not know what it holds, or who owns a slot.

    kv_append:   cache[slots[r], positions[r]] = new[r]                  caches (S, L, H, D), new k and v (R, H, D)
    kv_reorder:  cache[target[r]] = cache[source[r]] as it was before    overlapping permutations are right

Any dtype and strides; new rows are cast to the caches' dtype. slots, positions, source, target int32 or int64 (R,), in
range (the caller's word: reading them on the host would wait for a CUDA device; on CPU an index above the range raises
IndexError, and the `cpu` rows refuse negative ones too); (slot, position) pairs and targets are distinct. No gradient
flows through the cache.
"""

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.kv_cache import reference, torch_impl
from miss.kernels.registry import ALL_FLOATS, Impl, Op, lazy, triton

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})


def _runs(t: Tensor) -> bool:
    """Whether (…, H, D) keeps the numbers of a row's heads one behind another."""
    heads, width = t.shape[-2:]
    across, along = t.stride()[-2:]
    return (along == 1 or width == 1) and (across == width or heads == 1)


def _append_limits(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    if not v_cache.dtype == k_cache.dtype or not k.dtype == v.dtype or k.dtype not in CPU_DTYPES:
        return "takes float32 and bfloat16, k and v alike"
    return (
        None
        if _runs(k) and _runs(v) and _runs(k_cache) and _runs(v_cache)
        else "needs the heads of a row one behind another"
    )


def _triton_append_limits(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    if not {k_cache.dtype, v_cache.dtype, k.dtype, v.dtype} <= ALL_FLOATS:
        return "takes floating-point caches and rows"
    return _triton_reorder_limits(k_cache, v_cache)


def _triton_reorder_limits(k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if v_cache.dtype != k_cache.dtype:
        return "takes caches of one dtype"
    # Within a slot offsets are 32-bit.
    spans = (sum((n - 1) * s for n, s in zip(c.shape[1:], c.stride()[1:], strict=True)) for c in (k_cache, v_cache))
    return None if max(spans) < 2**31 else "takes slots that span less than 2^31 numbers"


def _reorder_limits(k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    return None if _runs(k_cache) and _runs(v_cache) else "needs the heads of a row one behind another"


APPEND = Op(
    "kv_append",
    Impl(
        "cpu",
        lazy("kv_cache.cpu_impl", "append"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_append_limits,
    ),
    triton("kv_cache.triton_impl", "append", _triton_append_limits, ALL_FLOATS),
    Impl("torch", torch_impl.append, dtypes=ALL_FLOATS),
    Impl("reference", reference.append, dtypes=ALL_FLOATS),
)
REORDER = Op(
    "kv_reorder",
    Impl(
        "cpu",
        lazy("kv_cache.cpu_impl", "reorder"),
        device="cpu",
        dtypes=ALL_FLOATS,
        needs=extension.missing,
        limits=_reorder_limits,
    ),
    triton("kv_cache.triton_impl", "reorder", _triton_reorder_limits, ALL_FLOATS),
    Impl("torch", torch_impl.reorder, dtypes=ALL_FLOATS),
    Impl("reference", reference.reorder, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::kv_append", mutates_args=("k_cache", "v_cache"))
def _append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
    APPEND(k_cache, v_cache, k, v, slots, positions)


@_append.register_fake
def _(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
    return None


@torch.library.custom_op("miss::kv_reorder", mutates_args=("k_cache", "v_cache"))
def _reorder(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    REORDER(k_cache, v_cache, source, target)


@_reorder.register_fake
def _(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    return None


def kv_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Stores k, v (R, H, D) at `positions` (R,) of `slots` (R,) of the caches (S, L, H, D), in place.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape or k.shape != v.shape or k.shape[1:] != k_cache.shape[2:]:
        raise ValueError(
            f"kv_append: got caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}; wanted (S, L, H, D) twice, (R, H, D) twice"
        )
    if not slots.shape == positions.shape == k.shape[:1]:
        raise ValueError(
            f"kv_append: slots {tuple(slots.shape)}, positions {tuple(positions.shape)}; wanted ({k.shape[0]},)"
        )
    run = _append if torch.compiler.is_compiling() else APPEND
    run(k_cache, v_cache, k.detach(), v.detach(), slots, positions)


def kv_reorder(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copies slots `source` (R,) of the caches (S, L, H, D) to slots `target` (R,), in place.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"kv_reorder: got caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; wanted (S, L, H, D) twice"
        )
    if source.dim() != 1 or source.shape != target.shape:
        raise ValueError(f"kv_reorder: source {tuple(source.shape)}, target {tuple(target.shape)}; wanted (R,) twice")
    run = _reorder if torch.compiler.is_compiling() else REORDER
    run(k_cache, v_cache, source, target)
