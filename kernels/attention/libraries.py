"""Rows of other people's attention kernels: which package, which GPUs, and what each does not take.

Knows the libraries' documented limits; does not know their calls (`*_impl.py`). None of them was ever run here, but for
SDPA's flash back end on CPUs.

They draw dropout's mask by generators of their own, so that a seed would not mean what it means in every other row:
dropout is refused. Padding by lengths is known to FlexAttention alone, and to two back ends of SDPA as a mask; the
others take sequences packed.

Rows that stand above `torch` run by themselves where they are installed; those below are there to be forced and to be
measured against. flash-attn 2 and 3 stand above it for packed sequences, which PyTorch's own attention takes only
padded and masked. Unpadded, `torch` is PyTorch's build of the same kernels (or cuDNN's), so that nothing is to be won.
flash-attn 4 is a pre-release; xformers waits for the device to read the lengths, which ends a captured graph;
FlexAttention compiles for each new shape, tens of seconds that nobody asked for. SDPA's back ends, each by its name,
stand below `torch` because PyTorch chooses among them itself: on sm_90 and sm_100 cuDNN's first where it is newer than
9.15.0 (what is reported as 1.7 to 2.3 times as fast as flash-attn 2 on Hopper), elsewhere flash-attn 2. What none of
them takes falls to its `math` one, plain products, which `torch` is then.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels.registry import FLOATS, HALVES, Impl, lazy

WIDEST = 256  # head width of flash-attn 2 and 3
FLASH_4_WIDTHS = (64, 96, 128)
FLEX_NARROWEST = 16
CUDNN_MOST = 65535  # rows, and heads
EFFICIENT_WIDEST = 65536  # it splits wide heads


def _flash_misfit(q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None) -> str | None:
    width = q.shape[-1]
    if seed is not None:
        return "draws dropout by its own generator"
    if not q.dtype == k.dtype == v.dtype:
        return f"takes one dtype for all, got {q.dtype}, {k.dtype} and {v.dtype}"
    if width % 8 or width > WIDEST:
        return f"heads are a multiple of 8 up to {WIDEST} wide, got {width}"
    return None if q.numel() and k.numel() else "needs at least one row"


def flash(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, p: float, seed: Tensor | None
) -> str | None:
    """What flash-attn and xformers take of a padded batch: one without padding."""
    if lengths is not None:
        return "takes no lengths: packed sequences are for attention_varlen"
    return _flash_misfit(q, k, v, seed)


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *rest: Any) -> str | None:
    """What they take of packed sequences."""
    if offsets.dtype != torch.int32 or not offsets.is_contiguous():
        return "takes contiguous int32 offsets"
    return _flash_misfit(q, k, v, rest[-1])


def _flash_4(q: Tensor, *rest: Any) -> str | None:
    wide = None if q.shape[-1] in FLASH_4_WIDTHS else f"heads are {FLASH_4_WIDTHS} wide, got {q.shape[-1]}"
    return wide or flash(q, *rest)


def _flash_4_varlen(q: Tensor, *rest: Any) -> str | None:
    wide = None if q.shape[-1] in FLASH_4_WIDTHS else f"heads are {FLASH_4_WIDTHS} wide, got {q.shape[-1]}"
    return wide or flash_varlen(q, *rest)


def flex(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    if rest[-1] is not None:
        return "has no dropout"
    if not q.dtype == k.dtype == v.dtype:
        return f"takes one dtype for all, got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] < FLEX_NARROWEST:
        return f"heads are at least {FLEX_NARROWEST} wide, got {q.shape[-1]}"
    return None if q.numel() and k.numel() else "needs at least one row"


def _sdpa_misfit(q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, multiple: int, widest: int) -> str | None:
    width = q.shape[-1]
    if seed is not None:
        return "draws dropout by its own generator"
    if not q.dtype == k.dtype == v.dtype:
        return f"takes one dtype for all, got {q.dtype}, {k.dtype} and {v.dtype}"
    if width % multiple or width > widest:
        return f"heads are a multiple of {multiple} up to {widest} wide, got {width}"
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        return "a head's numbers must lie side by side"
    return None if q.numel() and k.numel() else "needs at least one row"


def sdpa_flash(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, p: float, seed: Tensor | None
) -> str | None:
    """No mask; from 193 wide on it is not trained on sm_86, sm_89 and sm_12x."""
    if lengths is not None:
        return "takes no lengths: they are a mask"
    if causal and q.shape[1] != k.shape[1]:
        return f"causal, it takes as many queries as keys, got {q.shape[1]} and {k.shape[1]}"
    return _sdpa_misfit(q, k, v, seed, 1, 192)


def sdpa_cudnn(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, p: float, seed: Tensor | None
) -> str | None:
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "is not deterministic, which torch.use_deterministic_algorithms asks for"
    if k.shape[1] == 1:
        return "takes at least two keys"
    if max(q.shape[0], q.shape[2]) > CUDNN_MOST:
        return f"takes at most {CUDNN_MOST} rows and heads, got {q.shape[0]} and {q.shape[2]}"
    return _sdpa_misfit(q, k, v, seed, 8, 128)


def sdpa_efficient(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, p: float, seed: Tensor | None
) -> str | None:
    if any(t.storage_offset() * t.element_size() % 16 for t in (q, k, v)):
        return "tensors begin at a multiple of 16 bytes of their memory"
    return _sdpa_misfit(q, k, v, seed, 16 // q.element_size(), EFFICIENT_WIDEST)


def sdpa_math(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, p: float, seed: Tensor | None
) -> str | None:
    return _sdpa_misfit(q, k, v, seed, 1, EFFICIENT_WIDEST)


# autograd sees through all of them: each brings its own backward.
_USUAL: dict[str, Any] = {"device": "cuda", "dtypes": HALVES, "composite": True}
_FLASH: dict[str, Any] = {**_USUAL, "capability": (8, 0), "requires": "flash_attn.flash_attn_interface"}
_FLASH_3: dict[str, Any] = {**_USUAL, "capability": (9, 0), "before": (10, 0), "requires": "flash_attn_interface"}
_FLASH_4: dict[str, Any] = {**_USUAL, "capability": (9, 0), "before": (12, 0), "requires": "flash_attn.cute"}
_XFORMERS: dict[str, Any] = {**_USUAL, "capability": (8, 0), "requires": "xformers.ops"}
# On older GPUs the memory-efficient one has no bfloat16.
_SDPA: dict[str, Any] = {"dtypes": HALVES, "composite": True, "capability": (8, 0)}
_FLEX: dict[str, Any] = {**_USUAL, "capability": (8, 0), "dtypes": FLOATS, "requires": "triton"}

BELOW = (
    Impl("flash_attn", lazy("attention.flash_attn_impl", "forward"), limits=flash, **_FLASH),
    Impl("flash_attn_3", lazy("attention.flash_attn_3_impl", "forward"), limits=flash, **_FLASH_3),
    Impl("flash_attn_4", lazy("attention.flash_attn_4_impl", "forward"), limits=_flash_4, **_FLASH_4),
    Impl("xformers", lazy("attention.xformers_impl", "forward"), limits=flash, **_XFORMERS),
    Impl("flex", lazy("attention.flex_impl", "forward"), limits=flex, **_FLEX),
    Impl("sdpa_flash", lazy("attention.sdpa_impl", "flash"), limits=sdpa_flash, **_SDPA),
    Impl("sdpa_cudnn", lazy("attention.sdpa_impl", "cudnn"), limits=sdpa_cudnn, device="cuda", **_SDPA),
    Impl(
        "sdpa_efficient",
        lazy("attention.sdpa_impl", "efficient"),
        limits=sdpa_efficient,
        device="cuda",
        **_SDPA | {"dtypes": FLOATS},
    ),
    Impl(
        "sdpa_math",
        lazy("attention.sdpa_impl", "math"),
        limits=sdpa_math,
        device="cuda",
        dtypes=FLOATS,
        composite=True,
    ),
)
VARLEN_ABOVE = (
    Impl("flash_attn_3", lazy("attention.flash_attn_3_impl", "varlen_forward"), limits=flash_varlen, **_FLASH_3),
    Impl("flash_attn", lazy("attention.flash_attn_impl", "varlen_forward"), limits=flash_varlen, **_FLASH),
)
VARLEN_BELOW = (
    Impl("flash_attn_4", lazy("attention.flash_attn_4_impl", "varlen_forward"), limits=_flash_4_varlen, **_FLASH_4),
    Impl("xformers", lazy("attention.xformers_impl", "varlen_forward"), limits=flash_varlen, **_XFORMERS),
)
