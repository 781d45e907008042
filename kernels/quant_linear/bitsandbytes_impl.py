"""nf4 and LLM.int8 by bitsandbytes: how it packs them, and its products.

Knows that library's functions (0.50; the only file here that imports it); does not know how the bytes lie
(`packing.py`), or which layers are packed. On CPU its products are no faster than bf16: they are here for the models
that were made with them, and for CUDA.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from miss.kernels.quant_linear.packing import NF4, NF4_BLOCK, OUTLIER, PackedWeight


def _library() -> Any:
    """
    Raises:
        ImportError: bitsandbytes is not installed; says how to install it.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            f"nf4 and llm-int8 are packed by bitsandbytes, which cannot be imported here ({error}): "
            f"pip install 'miss-engine[bitsandbytes]'"
        ) from None


def pack_nf4(weight: Tensor) -> PackedWeight:
    """A float matrix (N, K) as nf4, blocks of 64."""
    functional = _library().functional
    codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    shape = (weight.shape[0], weight.shape[1])
    return PackedWeight(codes.flatten(), state.absmax.float(), None, "nf4", NF4_BLOCK, shape)


def pack_llm_int8(weight: Tensor) -> PackedWeight:
    """A float matrix (N, K) as LLM.int8's rows, rounded from float16 as the library does."""
    codes, largest, _ = _library().functional.int8_vectorwise_quant(weight.half())
    return PackedWeight(codes, largest.float() / 127, None, "llm-int8", 0, (weight.shape[0], weight.shape[1]))


def nf4(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    bnb = _library()
    code = torch.tensor(NF4, device=x.device)
    shape = torch.Size((2 * len(data) // columns, columns))
    state = bnb.functional.QuantState(scale, shape, code, NF4_BLOCK, "nf4", x.dtype)
    rows = x.reshape(-1, columns).contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    return bnb.matmul_4bit(rows, data.view(1, -1), state, bias=bias).view(*x.shape[:-1], shape[0])


def llm_int8(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """In float16, as the library computes."""
    bnb = _library()
    state = bnb.MatmulLtState()
    state.CB, state.SCB = data, scale * 127
    state.has_fp16_weights, state.is_training, state.threshold = False, False, OUTLIER
    rows = x.reshape(-1, x.shape[-1]).half().contiguous()
    y = bnb.matmul(rows, data, state=state, threshold=OUTLIER, bias=None if bias is None else bias.half())
    return y.to(x.dtype).view(*x.shape[:-1], len(data))
