"""Cross-attention's weight-absorbed form in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round (here conversions truncate), races between
programs, or alignment.
"""

import pytest
import torch

from miss.kernels.cross_attention import KV, cross_attention, op, reference, torch_impl, triton_tokens_impl
from miss.kernels.launches import Launch
from miss.kernels.registry import use
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

INF = float("inf")
SEED, P = 23, 0.3
# rows of each image, (queries, keys, heads, head width, token width), lengths
SIZES = [
    ([1, 1, 1], (1, 1, 2, 32, 64), None),
    ([3, 0, 1, 2], (3, 17, 2, 32, 40), [17, 5, 0, 1]),
    ([0, 5, 0, 1], (2, 65, 3, 64, 33), None),
    ([2, 3], (3, 130, 2, 32, 96), [129, 64]),
    ([0, 0], (3, 5, 1, 32, 16), None),
]


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(counts, shape, lengths, dtype, dropout_p=0.0, bias=True):
    generator = torch.Generator().manual_seed(0)
    queries, keys, heads, width, channels = shape
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int().to(DEVICE)
    shapes = ((len(index), queries, 2, heads, width), (len(counts), keys, 2, channels), (2, heads * width, channels))
    q, x, w = (torch.randn(s, generator=generator) for s in shapes)
    w, b_v = w / channels**0.5, torch.randn(heads * width, generator=generator)
    q, x, w, b_v = (t.to(DEVICE, dtype) for t in (q, x, w, b_v))
    seed = torch.tensor(SEED) if dropout_p else None
    rest = [index, None if lengths is None else int32(lengths), width**-0.5, dropout_p, seed]
    return [q[:, :, 1], x[:, :, 0], w[0], w[1], b_v if bias else None, *rest]


def check(size, dtype, dropout_p=0.0, bias=True, forward=triton_tokens_impl.tokens_forward):
    args = inputs(*size, dtype, dropout_p, bias)
    out, lse = forward(*args)
    doubled = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    exact, exact_lse = reference.tokens_forward(*doubled)
    floor = 2e-6 if dtype == torch.float32 else 8e-3 if dtype == torch.bfloat16 else 1e-3
    assert_as_good_as(out, torch_impl.tokens_forward(*args)[0], exact, slack=3.0, floor=floor, what="out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    close = 2e-5 if dtype == torch.float32 else 2e-2  # of q w_k, which is rounded to the dtype
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], atol=close, rtol=close)


def force(monkeypatch, launch):
    monkeypatch.setattr(triton_tokens_impl, "LAUNCHES", dict.fromkeys(triton_tokens_impl.LAUNCHES, (launch,)))


@pytest.fixture
def small(monkeypatch):
    """Blocks that make many tiles and tails of few numbers."""
    force(monkeypatch, Launch({"BM": 16, "BN": 32, "BC": 32}, 1, 1))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[:2]))
def test_error_rule(size, dropout_p, small):
    check(size, torch.float32, dropout_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_rule_of_every_table_entry(dtype, monkeypatch):
    for kind, launches in triton_tokens_impl.LAUNCHES.items():
        if (kind == "float32") == (dtype == torch.float32):
            for launch in launches:
                force(monkeypatch, launch)
                check(SIZES[1], dtype, P)


def test_without_a_bias_and_at_197_keys(small):
    check(SIZES[3], torch.float32, P, bias=False)
    check(([1], (2, 197, 2, 64, 64), None), torch.float32)


def test_bitwise_the_same_whatever_rows_share_an_image(small):
    """Over integers, whose products the library's GEMMs make exactly in any batch."""
    q, x, w_k, w_v, b_v, index, lengths, *rest = inputs(
        [1, 7, 0, 2], (3, 70, 2, 32, 40), [70, 33, 8, 65], torch.float32
    )
    q, w_k = (q * 2).round(), (w_k * 20).round() / 16
    together = triton_tokens_impl.tokens_forward(q, x, w_k, w_v * 0, b_v, index, lengths, *rest)
    for row in (0, 1, 5, 9):
        one = slice(int(index[row]), int(index[row]) + 1)
        alone = triton_tokens_impl.tokens_forward(
            q[row : row + 1], x[one], w_k, w_v * 0, b_v, int32([0]), lengths[one], *rest
        )
        assert all(torch.equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))


def test_nan_and_infinity_among_the_visible(small):
    q, x, w_k, w_v, b_v, index, lengths, *rest = inputs([1, 1, 1], (2, 70, 1, 32, 40), [65, 65, 65], torch.float32)
    x[0, 2], x[1, 64], x[2, 66] = float("nan"), INF, float("nan")  # the last is past its image's length
    out, lse = triton_tokens_impl.tokens_forward(q, x, w_k, w_v, b_v, index, lengths, *rest)
    assert out[:2].isnan().all() and out[2].isfinite().all() and lse[2].isfinite().all()


def test_it_is_attention_over_what_it_absorbs(small):
    q, x, w_k, w_v, b_v, index, lengths, *rest = inputs(*SIZES[1], torch.float32)
    heads = q.shape[2:]
    k, v = (x @ w_k.T).unflatten(-1, heads), (x @ w_v.T + b_v).unflatten(-1, heads)
    with use(cross_attention="reference"):
        wanted = cross_attention(q, KV(k, v), index, lengths)
    got, _ = triton_tokens_impl.tokens_forward(q, x, w_k, w_v, b_v, index, lengths, *rest)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bug", ["mask", "tail", "scale", "image", "dropout", "bias", "head"])
def test_planted_bugs_are_seen(bug, small):
    def wrong(q, x, w_k, w_v, b_v, index, lengths, scale, dropout_p, seed):
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
            b_v = None
        if bug == "head":
            w_k = w_k.roll(32, 0)
        return triton_tokens_impl.tokens_forward(q, x, w_k, w_v, b_v, index, lengths, scale, dropout_p, seed)

    with pytest.raises(AssertionError, match="error"):
        check(SIZES[3], torch.float32, P if bug == "dropout" else 0.0, forward=wrong)


def test_the_table_says_what_is_not_taken():
    limits = next(i.limits for i in op.TOKENS_FORWARD.impls if i.name == "triton")
    q, x, *rest = inputs(*SIZES[1], torch.float32)
    assert limits(q, x, *rest) is None
    assert "one dtype" in limits(q.bfloat16(), x, *rest)
    assert "side by side" in limits(q, x.contiguous().transpose(1, 2), *rest)
    assert "one column" in limits(q, x[..., :0], *rest)
    assert "scale" in limits(q, x, *rest[:5], -1.0, *rest[6:])
