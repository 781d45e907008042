"""A prepared int8 weight that keeps its panels alone: every reader finds the numbers that stood in its rows."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.kernels import extension
from miss.kernels.linear_top_k import linear_at, linear_top_k
from miss.kernels.quant_linear import (
    from_flat,
    pack_int4,
    pack_int8,
    prepare,
    quant_embedding,
    quant_linear,
    quant_linear_into,
    quant_linear_rows,
    quant_linear_rows_quantised,
    quantise_rows,
    to_flat,
    unpack,
)
from miss.kernels.quant_linear.packing import row_major, rows_at
from miss.kernels.registry import use

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
SHAPES = [(70, 37), (64, 64), (1, 1), (129, 5), (32, 256)]


def weight(shape, dynamic=True):
    torch.manual_seed(sum(shape))
    return prepare(pack_int8(torch.randn(shape), dynamic))


def same(a, b):
    a, b = ([t] if isinstance(t, torch.Tensor) else [*t] for t in (a, b))
    assert len(a) == len(b) and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@settings(max_examples=40, deadline=None)
@given(outputs=st.integers(0, 140), columns=st.integers(0, 40), data=st.data())
def test_the_rows_come_back(outputs, columns, data):
    packed = weight((outputs, columns))
    given_up = packed.in_panels()
    assert given_up.data is packed.prepared.panels and given_up.shape == packed.shape
    assert given_up.nbytes == packed.nbytes
    same(row_major(given_up.data, packed.scale, columns), packed.data)
    same(unpack(given_up), unpack(packed))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, outputs - 1), max_size=6)) if outputs else [])[None].long()
    same(rows_at(given_up.data, packed.scale, ids, columns), packed.data[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", [None, "torch", "reference"])
def test_every_product_is_the_same_to_the_bit(row, shape, dtype):
    x, bias = torch.randn(3, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    ids = torch.randint(0, shape[0], (3, 4))
    asked = {"quant_linear": row, "quant_linear_w8a8": row, "quant_embedding": row, "quant_linear_into": row}
    asked |= {"quant_linear_rows": row, "quant_linear_rows_quantised": row}
    asked |= {"linear_top_k_w8a8": row, "linear_at_w8a8": row}
    if shape[1] == 1 and row == "torch":  # `_int_mm` is wrong there
        asked = dict.fromkeys(("quant_linear", "quant_embedding", "linear_at_w8a8"), row)
    with use(**{name: row for name in asked if row is not None}):
        for dynamic in (False, True):
            packed = weight(shape, dynamic)
            given_up = packed.in_panels()
            same(quant_linear(x, given_up, bias), quant_linear(x, packed, bias))
            same(quant_embedding(ids, given_up, dtype), quant_embedding(ids, packed, dtype))
        same(linear_top_k(x, given_up, bias, 1), linear_top_k(x, packed, bias, 1))
        same(linear_at(x, given_up, bias, ids), linear_at(x, packed, bias, ids))
        rows = quantise_rows(x)
        same(quant_linear_rows(rows, given_up, bias), quant_linear_rows(rows, packed, bias))
        same(quant_linear_rows_quantised(rows, given_up, bias), quant_linear_rows_quantised(rows, packed, bias))
        made, wanted = (torch.zeros(3, *_split(shape[0]), dtype=dtype) for _ in range(2))
        same(quant_linear_into(x, given_up, bias, made), quant_linear_into(x, packed, bias, wanted))


def _split(outputs):
    return (outputs // 32, 32) if outputs % 32 == 0 else (outputs, 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_are_those_of_the_rows(dynamic):
    packed = weight((70, 37), dynamic)
    found = []
    for one in (packed, packed.in_panels()):
        x = torch.ones(2, 37, requires_grad=True)
        quant_linear(x, one).square().sum().backward()
        found.append(x.grad)
    same(*found)


def test_a_traced_product():
    packed = weight((70, 37)).in_panels()
    x = torch.randn(2, 37)
    compiled = torch.compile(lambda x: quant_linear(x, packed), backend="eager", fullgraph=True)
    same(compiled(x), quant_linear(x, packed))


def test_files_other_places_and_copies_have_rows():
    packed = weight((70, 37))
    given_up = packed.in_panels()
    same(to_flat(given_up, "w")["w.data"], packed.data)
    same(from_flat(to_flat(given_up, "w"), "w").data, packed.data)
    moved = given_up.to("meta")
    assert moved.data.shape == packed.data.shape and moved.prepared is None
    assert given_up.to("cpu") is given_up
    same(copy.deepcopy(given_up).data, given_up.data)


def test_what_is_not_in_panels_stays_as_it_is():
    plain = pack_int8(torch.randn(5, 7))
    assert plain.in_panels() is plain
    four = prepare(pack_int4(torch.randn(5, 64), 32, search=False))
    assert four.prepared is not None and four.in_panels() is four
    eight = prepare(plain).in_panels()
    assert prepare(eight) is eight and eight.in_panels().data is eight.data
