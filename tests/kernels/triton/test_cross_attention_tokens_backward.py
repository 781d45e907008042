"""The weight-absorbed form's gradient in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round (here conversions truncate), races between
programs, or alignment.
"""

import pytest
import torch

from miss.kernels.cross_attention import op, reference, torch_impl, triton_tokens_backward_impl, triton_tokens_impl
from miss.kernels.launches import Launch
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

SEED, P = 23, 0.3
NAMES = ["dq", "dx", "dw_k", "dw_v", "db_v"]
# rows of each image, (queries, keys, heads, head width, token width), lengths
SIZES = [
    ([1, 1, 1], (1, 1, 2, 32, 64), None),
    ([3, 0, 1, 2], (3, 17, 2, 32, 40), [17, 5, 0, 1]),
    ([0, 5, 0, 1], (2, 65, 3, 64, 33), None),
    ([2, 3], (3, 70, 2, 32, 64), [69, 33]),
    ([0, 0], (3, 5, 1, 32, 16), None),
]


def inputs(counts, shape, lengths, dtype, dropout_p=0.0, bias=True):
    """dout, then what forward takes."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, heads, width, channels = shape
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int().to(DEVICE)
    shapes = ((len(index), queries, 3, heads, width), (len(counts), keys, 2, channels), (2, heads * width, channels))
    q, x, w = (torch.randn(s, generator=generator) for s in shapes)
    w, b_v = w / channels**0.5, torch.randn(heads * width, generator=generator)
    q, x, w, b_v = (t.to(DEVICE, dtype) for t in (q, x, w, b_v))
    seed = torch.tensor(SEED) if dropout_p else None
    valid = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    rest = [index, valid, width**-0.5, dropout_p, seed]
    return q[:, :, 2], [q[:, :, 1], x[:, :, 0], w[0], w[1], b_v if bias else None, *rest]


def double(values):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in values]


def gradients(module, dout, args):
    """With an exact out and lse, in the dtype."""
    out, lse = reference.tokens_forward(*double(args))
    wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
    return module.tokens_backward(dout, *args[:5], out.to(dout.dtype), lse.to(wide), *args[5:])


def check(size, dtype, dropout_p=0.0, bias=True, module=triton_tokens_backward_impl, spoil=lambda dout, args: None):
    dout, args = inputs(*size, dtype, dropout_p, bias)
    exact = gradients(reference, dout.double(), double(args))
    low = gradients(torch_impl, dout, args)
    args = spoil(dout, list(args)) or args
    got = gradients(module, dout, args)
    # With one key dS is 0: dP and dout . out are made two ways, and their roundings are left.
    floor = 5e-6 if dtype == torch.float32 else 1.6e-2 if dtype == torch.bfloat16 else 2e-3
    for name, g, plain, e in zip(NAMES, got, low, exact, strict=True):
        assert (g is None) == (e is None), name
        if g is not None:
            assert g.dtype == dtype
            assert_as_good_as(g, plain, e, slack=3.0, floor=floor, what=name)


def force(monkeypatch, launch):
    tables = [getattr(triton_tokens_backward_impl, name) for name in ("SLOPES", "QUERIES", "TOKENS")]
    for table in (triton_tokens_impl.LAUNCHES, *tables):
        for kind in table:
            monkeypatch.setitem(table, kind, (launch,))


@pytest.fixture
def small(monkeypatch):
    """Blocks that make many tiles and tails of few numbers."""
    force(monkeypatch, Launch({"BM": 16, "BN": 32, "BC": 32}, 1, 1))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[:2]))
def test_error_rule(size, dropout_p, small):
    check(size, torch.float32, dropout_p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype, small):
    check(SIZES[1], dtype, P)
    check(SIZES[2], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_launches_of_the_tables(dtype):
    """`float32`'s and, at 3 queries of 2 heads, `few`'s; `many`'s at 17 of 2."""
    check(SIZES[1], dtype)
    if dtype == torch.bfloat16:
        check(([1, 1], (17, 33, 2, 32, 40), None), dtype)


def test_without_a_bias_and_at_197_keys(small):
    check(SIZES[3], torch.float32, P, bias=False)
    check(([1], (2, 197, 2, 32, 64), None), torch.float32)


def test_the_same_bits_again_and_in_any_strides(small):
    dout, args = inputs(*SIZES[3], torch.float32, P)
    first, again = (gradients(triton_tokens_backward_impl, dout, args) for _ in range(2))
    assert all(map(torch.equal, first, again))
    dense = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in args]
    assert all(map(torch.equal, gradients(triton_tokens_backward_impl, dout.contiguous(), dense), first))


def test_what_is_not_seen_takes_no_gradient(small):
    dout, args = inputs(*SIZES[1], torch.float32)
    dx = gradients(triton_tokens_backward_impl, dout, args)[1]
    assert not dx[1].any(), "an image without rows"
    assert not dx[2].any(), "an image of length 0"
    assert not dx[3, 1:].any() and dx[3, 0].any() and dx[0].all(-1).all()


def test_its_forward_and_backward_are_one(small):
    """With our own out and lse in place of the exact ones."""
    dout, args = inputs(*SIZES[3], torch.float32, P)
    out, lse = triton_tokens_impl.tokens_forward(*args)
    got = triton_tokens_backward_impl.tokens_backward(dout, *args[:5], out, lse, *args[5:])
    wanted = gradients(reference, dout.double(), double(args))
    for name, g, e in zip(NAMES, got, wanted, strict=True):
        torch.testing.assert_close(g.double(), e, atol=3e-5, rtol=3e-5, msg=name)


@pytest.mark.parametrize("bug", ["mask", "tail", "scale", "image", "dropout", "bias", "head"])
def test_planted_bugs_are_seen(bug, small):
    def spoil(dout, args):
        q, x, w_k, w_v, b_v, index, lengths, scale, dropout_p, seed = args
        if bug == "mask":
            lengths = None
        if bug == "tail":
            lengths = lengths - 1
        if bug == "scale":
            scale = scale * 1.01
        if bug == "image":
            index = torch.cat([index[:1], index[:-1]])
        if bug == "dropout":
            seed = seed + 1
        if bug == "bias":
            b_v = b_v * 0
        if bug == "head":
            w_k = w_k.roll(32, 0)
        return [q, x, w_k, w_v, b_v, index, lengths, scale, dropout_p, seed]

    with pytest.raises(AssertionError, match="error"):
        check(SIZES[3], torch.float32, P if bug in ("dropout", "bias") else 0.0, spoil=spoil)


def test_the_table_says_what_is_not_taken():
    limits = next(i.limits for i in op.TOKENS_BACKWARD.impls if i.name == "triton")
    dout, args = inputs(*SIZES[1], torch.float32)
    rest = [*args[2:5], dout, dout, *args[5:]]
    assert limits(dout, args[0], args[1], *rest) is None
    assert "one dtype" in limits(dout.bfloat16(), args[0], args[1], *rest)
    assert "one dtype" in limits(dout, args[0], args[1].bfloat16(), *rest)
    assert "side by side" in limits(dout, args[0], args[1].contiguous().transpose(1, 2), *rest)
