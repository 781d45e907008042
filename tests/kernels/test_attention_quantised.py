"""Attention with scores of int8 codes: its formula by the error rule, and how far that is from attention itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miss.kernels import extension
from miss.kernels.attention import attention, attention_quantised, quantised
from tests.helpers import assert_as_good_as, route, threads

BUILT = extension.missing() is None
ROUTES = [*(["cpu"] if BUILT else []), "reference"]


def literal(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula a head and query at a time: codes in float64, softmax and values in `dtype`."""
    out = torch.empty(q.shape, dtype=dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys = k[b, :, h].double()
            keys = keys - keys.mean(0)
            scale = keys.abs().amax(1) / 127
            scale[scale == 0] = 1
            codes = torch.round(keys / scale[:, None])
            for t in range(q.shape[1]):
                query = q[b, t, h].double()
                own = float(query.abs().max()) / 127 or 1.0
                scores = codes @ torch.round(query / own) * own * scale * q.shape[3] ** -0.5
                p = torch.softmax(scores, 0)
                out[b, t, h] = p.to(dtype) @ v[b, :, h].to(dtype)
    return out


def packed(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v as views of one projection, keys around a mean that is far from zero."""
    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 3, heads, width, generator=generator)
    x[:, :, 1] += 3 * torch.randn(heads, width, generator=generator)
    return x.to(dtype).unbind(2)


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 64), (2, 5, 3, 32), (1, 65, 2, 64), (1, 97, 1, 32), (2, 130, 2, 64), (1, 1100, 1, 32)]
)
def test_error_rule(way, dtype, shape):
    """Where float32 and float64 round a quotient apart, one code is a step off: that moved a result by up to 5e-4."""
    q, k, v = packed(shape, dtype)
    with route(way, quantised.FORWARD):
        got = attention_quantised(q, k, v)
    assert got.dtype == dtype and got.shape == q.shape
    assert_as_good_as(got, literal(q, k, v, dtype), literal(q, k, v, torch.float64), slack=3.0, floor=1e-3)


@pytest.mark.skipif(not BUILT, reason="csrc/ is not built")
@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 150),
    heads=st.integers(1, 4),
    width=st.sampled_from([32, 64]),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_same_bits_for_any_batch_and_threads(batch, tokens, heads, width, count, seed):
    q, k, v = packed((batch, tokens, heads, width), torch.bfloat16, seed)
    with route("cpu", quantised.FORWARD):
        together = attention_quantised(q, k, v)
        with threads(count):
            alone = [attention_quantised(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(batch)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.skipif(not BUILT, reason="csrc/ is not built")
@pytest.mark.parametrize("tokens", [197, 577])
def test_near_attention(tokens):
    """What codes cost: a few times bfloat16's own rounding of the result; without the mean taken off, far more."""
    q, k, v = packed((1, tokens, 4, 64), torch.bfloat16)
    exact = attention(q.double(), k.double(), v.double())
    with route("cpu", quantised.FORWARD):
        error = float((attention_quantised(q, k, v) - exact).norm() / exact.norm())
    rounding = float((attention(q, k, v) - exact).norm() / exact.norm())
    assert rounding < error < 0.02, (rounding, error)


@pytest.mark.skipif(not BUILT, reason="csrc/ is not built")
def test_a_constant_added_to_all_keys_changes_nothing_but_rounding():
    q, k, v = packed((1, 70, 2, 64), torch.float32)
    with route("cpu", quantised.FORWARD):
        torch.testing.assert_close(attention_quantised(q, k + 8, v), attention_quantised(q, k, v), atol=2e-3, rtol=0)


@pytest.mark.parametrize("way", ROUTES)
def test_nan_reaches_its_query_alone(way):
    q, k, v = (t.clone() for t in packed((1, 40, 2, 64), torch.float32))
    q[0, 7, 1, 5] = float("nan")
    v[0, 3, 0, 2] = float("inf")
    with route(way, quantised.FORWARD):
        out = attention_quantised(q, k, v)
    assert out[0, 7, 1].isnan().all() and out[0, :7, 1].isfinite().all() and out[0, 8:, 1].isfinite().all()
    assert not out[0, :, 0, 2].isfinite().any() and out[0, :, 0, 3:].isfinite().all()


def test_the_torch_row_is_attention():
    q, k, v = packed((2, 33, 2, 64), torch.float32)
    with route("torch", quantised.FORWARD):
        torch.testing.assert_close(attention_quantised(q, k, v), attention(q, k, v))


def test_wrong_shapes():
    q = torch.zeros(1, 3, 2, 64)
    with pytest.raises(ValueError, match=r"wanted \(B, N, H, D\) three times"):
        attention_quantised(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match="N at least 1"):
        attention_quantised(q[:, :0], q[:, :0], q[:, :0])


@pytest.mark.skipif(not BUILT, reason="csrc/ is not built")
def test_compiles_and_checks():
    q, k, v = packed((1, 9, 2, 32), torch.float32)
    torch.library.opcheck(torch.ops.miss.attention_quantised.default, (q, k, v, 0.2))
    compiled = torch.compile(lambda *x: attention_quantised(*x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attention_quantised(q, k, v))
