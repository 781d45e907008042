"""Attention in Triton against float64, by the error rule, long and short forms; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round, races between programs, alignment, or what the
compiler makes of products with several planes (a warp a head).
"""

import pytest
import torch

from miss.kernels.attention import reference, torch_impl, triton_backward_impl, triton_impl
from miss.kernels.attention.triton_rows_impl import Problem
from miss.kernels.dropout import as_seed
from miss.kernels.launches import Launch
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

SEED, P = 17, 0.3
FORMS = {"long": "float32", "short16": "short16", "short32": "short32", "short64": "short64"}
OPTIONS = {
    "all": (False, False, 0.0),
    "lengths": (True, False, 0.0),
    "causal": (False, True, 0.0),
    "every": (True, True, P),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tiles of 16 and 32, so that short sequences have full tiles and a tail; 2 heads a program, so that 3 do not fill
    them."""
    blocks = {
        "float32": (16, 32),
        "float32_keys": (32, 16),
        "long": (32, 16),
        "long_keys": (16, 32),
        "long_dropout_keys": (16, 32),
    }
    for module in (triton_impl, triton_backward_impl):
        for name, (rows, keys) in blocks.items():
            monkeypatch.setitem(module.LAUNCHES, name, (Launch({"BM": rows, "BN": keys}, 4, 1),))
        for name in ("short16", "short32"):
            monkeypatch.setitem(module.LAUNCHES, name, (Launch({"G": 2}, 4, 1),))


def force(monkeypatch, form):
    monkeypatch.setattr(Problem, "kind", FORMS[form])


class Triton:
    """The two modules of the row as one."""

    forward, backward = staticmethod(triton_impl.forward), staticmethod(triton_backward_impl.backward)


def seed_of(dropout_p):
    return as_seed(SEED, dropout_p)


def lengths_of(keys, batch):
    return torch.tensor([keys, keys // 2, 0][:batch], dtype=torch.int32, device=DEVICE)


def inputs(batch, queries, keys, heads, width, dtype):
    """q, k, v as views of packed projections, and an incoming gradient that is not dense."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, queries, 3, heads, width), (batch, keys, 3, heads, width), (batch, heads, queries, width))
    q, kv, dout = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in sizes)
    return q[:, :, 0], kv[:, :, 1], kv[:, :, 2], dout.transpose(1, 2)


def run(module, tensors, lengths, causal, dropout_p, scale=None):
    q, k, v, dout = tensors
    options = (lengths, causal, scale or q.shape[-1] ** -0.5, dropout_p, seed_of(dropout_p))
    out, lse = module.forward(q, k, v, *options)
    lse = reference.log_sum_exp(q, k, *options[:3]) if lse is None else lse
    return [out, lse, *module.backward(dout, q, k, v, out, lse, *options)]


def check(shape, option, dtype=torch.float32, module=Triton, floor=3e-6):
    tensors = inputs(*shape, dtype)
    padded, causal, dropout_p = OPTIONS[option]
    options = (lengths_of(shape[2], shape[0]) if padded else None, causal, dropout_p)
    got, low = run(module, tensors, *options), run(torch_impl, tensors, *options)
    exact = run(reference, [t.double() for t in tensors], *options)
    for name, g, p, e in zip(("out", "lse", "dq", "dk", "dv"), got, low, exact, strict=True):
        assert torch.equal(g == float("-inf"), e == float("-inf")), name
        g, p, e = (t.masked_fill(e == float("-inf"), 0.0) for t in (g, p, e))
        assert_as_good_as(g, p, e, floor=floor, what=name)


LONG = [
    (3, 1, 1, 2, 32),
    (2, 5, 5, 3, 64),
    (3, 17, 17, 1, 32),
    (2, 65, 65, 1, 64),
    (1, 64, 64, 1, 32),
    (2, 3, 37, 2, 32),
]
SHORT = [
    *(("short16", s) for s in ((3, 1, 1, 3, 32), (2, 5, 5, 4, 64), (3, 16, 16, 1, 32), (2, 3, 14, 3, 32))),
    *(("short32", s) for s in ((3, 17, 17, 3, 32), (2, 30, 30, 2, 64), (2, 1, 32, 2, 32))),
    *(("short64", s) for s in ((2, 37, 37, 2, 64), (3, 40, 64, 1, 32))),
]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long(monkeypatch, shape, option):
    force(monkeypatch, "long")
    check(shape, option)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("form", "shape"), SHORT, ids=str)
def test_short(monkeypatch, form, shape, option):
    force(monkeypatch, form)
    check(shape, option)
