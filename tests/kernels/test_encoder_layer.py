"""Whole encoder layers: the bits of the single operations, the error rule, padded and packed texts, with and without an
image, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miss.kernels import extension
from miss.kernels.cross_attention import KV
from miss.kernels.decoder_step import Layer, Matrix, Norm
from miss.kernels.encoder_layer import ImageLayer, image_layer, op, text_layer
from miss.kernels.quant_linear import pack_int4, pack_int8, prepare
from miss.kernels.registry import use
from tests.helpers import assert_as_good_as, threads
from tests.kernels.test_isa import copied, in_float64

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SIZES = pytest.mark.parametrize(("width", "heads", "inner"), [(128, 2, 260), (64, 2, 128), (192, 3, 96)], ids=str)


def norm(width: int, dtype: torch.dtype) -> Norm:
    return Norm((1 + 0.2 * torch.randn(width)).to(dtype), (0.2 * torch.randn(width)).to(dtype), 1e-6)


def dense(outputs: int, inputs: int, dtype: torch.dtype) -> Matrix:
    packed = prepare(pack_int8(torch.randn(outputs, inputs) * 1.5 / inputs**0.5, dynamic=True)).in_panels()
    return Matrix(packed, (0.1 * torch.randn(outputs)).to(dtype))


def image_weights(width: int, inner: int, dtype: torch.dtype) -> ImageLayer:
    return ImageLayer(
        *(norm(width, dtype), dense(3 * width, width, dtype), dense(width, width, dtype)),
        *(norm(width, dtype), dense(inner, width, dtype), dense(width, inner, dtype)),
    )


def text_weights(width: int, inner: int, dtype: torch.dtype) -> Layer:
    return Layer(
        *(dense(3 * width, width, dtype), dense(width, width, dtype), norm(width, dtype)),
        *(dense(width, width, dtype), dense(width, width, dtype), norm(width, dtype)),
        *(dense(inner, width, dtype), dense(width, inner, dtype), norm(width, dtype)),
    )


def source(images: int, tokens: int, width: int, heads: int, dtype: torch.dtype) -> KV:
    """Head by head in memory, as the image's projection writes it."""
    k, v = (torch.randn(images, heads, tokens, width // heads).to(dtype).transpose(1, 2) for _ in range(2))
    return KV(k, v)


def judge(got: Tensor, plain: Tensor, wanted: Tensor) -> None:
    # A code that rounds the other way is a 127th of its row's largest off, and which way one goes is chance.
    assert got.dtype == plain.dtype and got.shape == wanted.shape
    assert_as_good_as(got, plain, wanted, 4.0, 2e-2)


@DTYPES
@SIZES
@pytest.mark.parametrize("shape", [(1, 1), (2, 17), (1, 197), (3, 5), (0, 7)], ids=str)
def test_image_layer(shape: tuple[int, int], width: int, heads: int, inner: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights, x = image_weights(width, inner, dtype), torch.randn(*shape, width).to(dtype)
    got = image_layer(x, weights, heads)
    with use(image_layer="composed"):
        assert torch.equal(image_layer(x, weights, heads), got)
    plain = {"layer_norm_quantised", "add_layer_norm_quantised", "quant_linear_w8a8", "quant_linear_rows"}
    with use(image_layer="composed", **{name: "torch" for name in (*plain, "quant_linear_rows_quantised")}):
        rows = image_layer(x, weights, heads)
    with use(image_layer="reference"):
        judge(got, rows, image_layer(x.double(), in_float64(copied(weights)), heads))


@DTYPES
@SIZES
@pytest.mark.parametrize("over_image", [False, True])
@pytest.mark.parametrize("form", ["whole", "lengths", "packed"])
def test_text_layer(form: str, over_image: bool, width: int, heads: int, inner: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weights, counts = text_weights(width, inner, dtype), [9, 1, 5]
    lengths = offsets = None
    shape, rows = (3, 9), torch.tensor([0, 0, 1], dtype=torch.int32)
    if form == "lengths":
        lengths = torch.tensor(counts, dtype=torch.int32)
    if form == "packed":
        offsets = torch.tensor([0, 9, 10, 15], dtype=torch.int32)
        shape, rows = (15,), rows.repeat_interleave(torch.tensor(counts))
    x = torch.randn(*shape, width).to(dtype)
    read = (source(2, 19, width, heads, dtype), rows) if over_image else (None, None)
    args = (heads, lengths, offsets, 9 if form == "packed" else 0, *read)
    got = text_layer(x, weights, *args)
    with use(text_layer="composed"):
        assert torch.equal(text_layer(x, weights, *args), got)
        with use(quant_linear_rows="torch", quant_linear_w8a8="torch", add_layer_norm_quantised="torch"):
            plain = text_layer(x, weights, *args)
    with use(text_layer="reference"):
        truth = text_layer(x.double(), in_float64(copied(weights)), *in_float64(copied(args)))
    judge(got, plain, truth)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=6), threads_=st.integers(1, 3))
def test_a_packed_text_does_not_depend_on_the_others(counts: list[int], threads_: int) -> None:
    torch.manual_seed(2)
    weights, image = text_weights(128, 260, torch.bfloat16), source(1, 33, 128, 4, torch.bfloat16)
    texts = [torch.randn(count, 128).bfloat16() for count in counts]
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    index = torch.zeros(sum(counts), dtype=torch.int32)
    with threads(threads_):
        together = text_layer(torch.cat(texts), weights, 4, None, offsets, max(counts), image, index)
    for i, text in enumerate(texts):
        one = torch.tensor([0, len(text)], dtype=torch.int32)
        alone = text_layer(text, weights, 4, None, one, len(text), image, index[: len(text)])
        assert torch.equal(together[offsets[i] : offsets[i + 1]], alone)


def test_which_row_runs() -> None:
    weights, x = image_weights(128, 64, torch.float32), torch.randn(1, 3, 128)
    assert op.IMAGE.select(x, weights, 2).name == "cpu"
    assert op.IMAGE.select(x.double(), weights, 2).name == "composed"
    assert op.IMAGE.select(x, weights, 8).name == "composed", "heads 16 wide"
    assert op.IMAGE.select(x.bfloat16(), weights._replace(qkv=weights.qkv._replace(bias=None)), 2).name == "composed"
    loose = weights._replace(input=Matrix(pack_int8(torch.randn(64, 128), dynamic=True), torch.zeros(64)))
    assert op.IMAGE.select(x, loose, 2).name == "composed"
    with torch.autocast("cpu", torch.bfloat16):
        assert op.IMAGE.select(x, weights, 2).name == "composed"


def test_what_is_refused() -> None:
    weights, x = text_weights(64, 32, torch.float32), torch.randn(2, 3, 64)
    image, index = source(2, 5, 64, 2, torch.float32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="wanted 3 dimensions"):
        text_layer(x[0], weights, 2)
    with pytest.raises(ValueError, match="a source and the rows' index"):
        text_layer(x, weights, 2, source=image)
    with pytest.raises(ValueError, match="lengths of padded rows or offsets"):
        text_layer(x[0], weights, 2, index, torch.tensor([0, 3], dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="x is 32 wide"):
        text_layer(x[..., :32], weights, 2)
    with pytest.raises(ValueError, match="int8 activations"):
        text_layer(x, weights._replace(input=Matrix(pack_int4(torch.randn(32, 64), search=False), None)), 2)
    with pytest.raises(ValueError, match="image_index"):
        text_layer(x, weights, 2, source=image, index=torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="image_index"):
        text_layer(x, weights, 2, source=image, index=torch.tensor([1, 0], dtype=torch.int32))
