"""A whole layer of an encoder whose linear layers are packed int8 and take int8 codes (W8A8).

Knows the contract and who computes it; does not know who stacks the layers, or where their weights come from.

    image_layer (pre-norm):   x = x + W_o attention(norm x);  x = x + W_2 gelu(W_1 norm x)
    text_layer (post-norm):   x = norm(x + W_o attention(x));  x = norm(x + W_c attention(W_q x over an image));
                              x = norm(x + W_2 gelu(W_1 x))

Numbers are rounded to codes row by row before each product; between the two of an MLP they pass as codes alone. An
image's scores are products of codes too (`attention_quantised`). x (I, N, C) or (R, T, C), the result as x. For
inference: no gradient.

The `cpu` row is one call of csrc/ (`ops_encoder_layer.cpp`), which makes the calls of the `composed` row: the same
bits. `composed` is the single operations, each of which chooses its own row; on a GPU it is the layer, captured as a
graph.
"""

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.cross_attention import KV
from miss.kernels.decoder_step.weights import Layer
from miss.kernels.encoder_layer import composed, reference
from miss.kernels.encoder_layer.weights import ImageLayer, matrices
from miss.kernels.quant_linear import PackedWeight
from miss.kernels.registry import ALL_FLOATS, Impl, Op, lazy

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})


def _cpu_limits(x: Tensor, layer: ImageLayer | Layer, num_heads: int, *_: object) -> str | None:
    if x.shape[-1] // num_heads not in (32, 64):
        return f"takes heads 32 or 64 wide, got {x.shape[-1] // num_heads}"
    for matrix in matrices(layer):
        assert isinstance(matrix.weight, PackedWeight)
        if matrix.weight.prepared is None:
            return "a weight is not prepared (`prepare`)"
        if matrix.bias is None or matrix.bias.dtype not in (x.dtype, torch.float32):
            return f"wants biases in {x.dtype} or float32"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


IMAGE = Op(
    "image_layer",
    Impl(
        "cpu",
        lazy("encoder_layer.cpu_impl", "image_layer"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_cpu_limits,
    ),
    Impl("composed", composed.image_layer, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.image_layer, dtypes=ALL_FLOATS),
)
TEXT = Op(
    "text_layer",
    Impl(
        "cpu",
        lazy("encoder_layer.cpu_impl", "text_layer"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_cpu_limits,
    ),
    Impl("composed", composed.text_layer, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.text_layer, dtypes=ALL_FLOATS),
)


def image_layer(x: Tensor, layer: ImageLayer, num_heads: int) -> Tensor:
    """x (I, N, C) -> the same shape.

    Raises:
        ValueError: a weight that is not packed int8 with int8 activations, or of another width than x.
    """
    _check("image_layer", x, layer, 3)
    if torch.compiler.is_compiling():  # a graph sees the single operations
        return composed.image_layer(x, layer, num_heads)
    return IMAGE.with_autocast(x, layer, num_heads)  # type: ignore[no-any-return]


def text_layer(
    x: Tensor,
    layer: Layer,
    num_heads: int,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int = 0,
    source: KV | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """x (R, T, C) -> the same shape; packed, (M, C), where `offsets` are given.

    Args:
        lengths: int32 (R,), the tokens of each row that others see; None: all.
        offsets: int32 (R + 1,), where each of the packed rows begins, none longer than `max_length`.
        source: K and V (I, N, H, D) of images; None leaves cross-attention out.
        index: int32 (R,), packed (M,): the image of each row or token, non-decreasing.

    Raises:
        ValueError: a weight that is not packed int8 with int8 activations, or of another width than x; a source without
            index; lengths beside offsets.
    """
    _check("text_layer", x, layer, 3 if offsets is None else 2)
    if (source is None) != (index is None):
        raise ValueError("text_layer: wanted a source and the rows' index into it, or neither")
    if lengths is not None and offsets is not None:
        raise ValueError("text_layer: got lengths and offsets; wanted lengths of padded rows or offsets of packed ones")
    args = (x, layer, num_heads, lengths, offsets, max_length, source, index)
    if torch.compiler.is_compiling():
        return composed.text_layer(*args)
    return TEXT.with_autocast(*args)  # type: ignore[no-any-return]


def _check(name: str, x: Tensor, layer: ImageLayer | Layer, dims: int) -> None:
    if x.dim() != dims:
        raise ValueError(f"{name}: x is {tuple(x.shape)}; wanted {dims} dimensions, the last of them the width")
    for matrix in matrices(layer):
        weight = matrix.weight
        if not isinstance(weight, PackedWeight) or not weight.w8a8:
            raise ValueError(
                f"{name}: wanted weights packed as int8 with int8 activations, got {type(weight).__name__}"
            )
    if layer.qkv.weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{name}: x is {x.shape[-1]} wide, the weights take {layer.qkv.weight.shape[1]}")
