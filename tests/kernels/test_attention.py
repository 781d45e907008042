"""Attention and packed attention: the error rule on odd shapes, what is visible, dropout, custom operators."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from miss.kernels import extension
from miss.kernels.attention import attention, attention_probabilities, attention_varlen, op
from miss.kernels.dropout import as_seed, keep_mask
from tests.helpers import CPU_ROUTES, assert_as_good_as, check_error_rule, route

OTHER_ROUTES = ["torch", "reference", "custom"]
ROUTES = [*CPU_ROUTES, *OTHER_ROUTES]
SEED, P = 17, 0.3


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, dropout_p: float) -> Tensor:
    """Attention as a textbook writes it, in the dtype of its inputs."""
    queries, keys = q.shape[1], k.shape[1]
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) / q.shape[-1] ** 0.5
    hidden = torch.zeros(len(q), 1, queries, keys, dtype=torch.bool)
    if lengths is not None:
        hidden |= torch.arange(keys) >= lengths.view(-1, 1, 1, 1)
    if causal:
        hidden |= torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
    p = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    p = torch.where(hidden.all(-1, keepdim=True), 0.0, p)
    if dropout_p:
        seed = as_seed(SEED, dropout_p)
        assert seed is not None
        p = p * keep_mask(seed, p.shape, dropout_p, p.device).to(p.dtype) / (1 - dropout_p)
    return torch.einsum("bhtn,bnhd->bthd", p, v)


def on_packed(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` of the q, k, v that are strided views of one projection (B, N, 3, H, D)."""
    return lambda packed: function(*packed.unbind(2))


OPTIONS = {
    "all": (False, False, 0.0),
    "lengths": (True, False, 0.0),
    "causal": (False, True, 0.0),
    "causal-lengths": (True, True, 0.0),
    "dropout": (True, True, P),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 1, 2, 32), (3, 7, 2, 64), (2, 37, 3, 32), (0, 5, 2, 32), (2, 0, 2, 32)], ids=str)
def test_error_rule(shape: tuple[int, ...], option: str, way: str, dtype: torch.dtype) -> None:
    batch, length, heads, width = shape
    padded, causal, dropout_p = OPTIONS[option]
    torch.manual_seed(0)
    lengths = int32([length, length // 2, 1][:batch]) if padded and length else None
    packed = torch.randn(batch, length, 3, heads, width)
    with route(way, op.FORWARD):
        check_error_rule(
            on_packed(lambda q, k, v: attention(q, k, v, lengths, causal, None, dropout_p, SEED)),
            on_packed(lambda q, k, v: plain(q, k, v, lengths, causal, dropout_p)),
            [packed],
            dtype,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 197, 2, 64), (2, 257, 1, 32), (1, 577, 1, 64), (1, 901, 1, 32)], ids=str)
def test_error_rule_at_image_lengths(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, heads, width = shape
    torch.manual_seed(0)
    packed = torch.randn(batch, length, 3, heads, width)
    ways = [
        (way, valid) for way in ("torch", "custom", *CPU_ROUTES) for valid in (None, int32([length - 60, 3][:batch]))
    ]
    for way, lengths in ways:
        with route(way, op.FORWARD):
            check_error_rule(
                on_packed(lambda q, k, v, lengths=lengths: attention(q, k, v, lengths)),
                on_packed(lambda q, k, v, lengths=lengths: plain(q, k, v, lengths, False, 0.0)),
                [packed],
                dtype,
            )


@pytest.mark.parametrize("way", OTHER_ROUTES)
def test_float16(way: str) -> None:
    torch.manual_seed(0)
    with route(way, op.FORWARD):
        check_error_rule(
            lambda q, k, v: attention(q, k, v, int32([11, 4])),
            lambda q, k, v: plain(q, k, v, int32([11, 4]), False, 0.0),
            [torch.randn(2, 5, 2, 32), torch.randn(2, 11, 2, 32), torch.randn(2, 11, 2, 32)],
            torch.float16,
        )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_lengths_and_order_of_strides(data: st.DataObject) -> None:
    batch, keys, heads = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 3))
    queries = data.draw(st.integers(1, keys))
    way, dtype = data.draw(st.sampled_from(ROUTES)), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    causal, width = data.draw(st.booleans()), data.draw(st.sampled_from([32, 64] if way == "cpu" else [32, 64, 5]))
    lengths = None
    if data.draw(st.booleans()):
        lengths = int32(data.draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch)))
    dropout_p = data.draw(st.sampled_from([0.0, P]))
    torch.manual_seed(0)
    # (B, H, N, D) in memory: what another model's layout hands over.
    q, k, v = (torch.randn(batch, heads, n, width).transpose(1, 2) for n in (queries, keys, keys))
    with route(way, op.FORWARD):
        check_error_rule(
            lambda q, k, v: attention(q, k, v, lengths, causal, None, dropout_p, SEED),
            lambda q, k, v: plain(q, k, v, lengths, causal, dropout_p),
            [q, k, v],
            dtype,
            # A maximum over as few as 5 numbers is a noisy yardstick, above all where they carry 8 bits. Over one key
            # the gradient of the scores is 0, which plain PyTorch hits exactly and dP - dout . out, with out rounded to
            # its dtype, does not.
            slack=4.0 if dtype == torch.float32 else 10.0,
            floor=3e-6 if dtype == torch.float32 or keys > 1 else 3e-2,
        )


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("queries", [1, 6])
def test_rows_of_length_zero(way: str, queries: int) -> None:
    q, k, v = (torch.randn(3, n, 2, 32, requires_grad=True) for n in (queries, 6, 6))
    with route(way, op.FORWARD):
        out = attention(q, k, v, int32([0, 6, 0]))
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert not attention(q, k, v, int32([0, 0, 0])).any()
    for t in (out, *grads):
        assert not t[0].any() and not t[2].any() and t.isfinite().all()
    assert out[1].any() and grads[2][1].any()


@pytest.mark.parametrize("way", ROUTES)
def test_no_keys_gives_zeros(way: str) -> None:
    q, kv = torch.randn(2, 3, 2, 32), torch.randn(2, 0, 2, 32)
    with route(way, op.FORWARD):
        assert torch.equal(attention(q, kv, kv), torch.zeros_like(q))


@pytest.mark.parametrize("way", ROUTES)
def test_causal_with_fewer_queries_than_keys(way: str) -> None:
    q, k, v = torch.randn(2, 3, 2, 32), torch.randn(2, 8, 2, 32), torch.randn(2, 8, 2, 32)
    with route(way, op.FORWARD):
        out = attention(q, k, v, causal=True)
        assert_close(out[:, 2:], attention(q[:, 2:], k, v))  # the last query sees all keys
        assert_close(out[:, :1], attention(q[:, :1], k[:, :6], v[:, :6]))  # the first all but the last two


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(way: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed, lengths = torch.randn(5, 41, 3, 2, 32, dtype=dtype), int32([41, 3, 17, 1, 40])
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    with route(way, op.FORWARD):
        together = attention(*packed.unbind(2), lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = attention(*packed[row : row + 1].unbind(2), lengths[row : row + 1])
            cut = attention(*packed[row : row + 1, :length].unbind(2))
            assert_close(together[row], alone[0], **tolerance)
            assert_close(together[row, :length], cut[0], **tolerance)


@pytest.mark.parametrize("way", ROUTES)
def test_invisible_keys_do_not_matter(way: str) -> None:
    q, k, v = (torch.randn(2, 9, 2, 32) for _ in range(3))
    with route(way, op.FORWARD):
        before = attention(q, k, v, int32([4, 9]))
        k[0, 4:], v[0, 4:] = 1e4, -1e4
        assert torch.equal(before, attention(q, k, v, int32([4, 9])))


def threads(count: int, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def with_gradients(packed: Tensor, lengths: Tensor, causal: bool, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    leaf = packed.detach().requires_grad_()
    out = attention(*leaf.unbind(2), lengths, causal, None, dropout_p, SEED)
    return out.detach(), torch.autograd.grad(out, leaf, packed[:, :, 0])[0]


@pytest.mark.skipif(not CPU_ROUTES, reason=str(extension.missing()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "width"), [(1, 64), (20, 32), (203, 32), (257, 64)])
def test_bitwise_the_same_in_any_batch_and_with_any_threads(
    length: int, width: int, causal: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    packed = torch.randn(4, length, 3, 3, width, dtype=dtype)
    lengths = int32([length, max(1, length // 3), 1, length])
    with route("cpu", op.FORWARD):
        together = threads(1, lambda: with_gradients(packed, lengths, causal, P))
        for count in (2, 3):
            for got, wanted in zip(
                threads(count, lambda: with_gradients(packed, lengths, causal, P)), together, strict=True
            ):
                assert torch.equal(got, wanted)
        together = with_gradients(packed, lengths, causal)  # dropout's mask knows a row's place in the batch
        for row in range(4):
            one = slice(row, row + 1)
            for got, wanted in zip(with_gradients(packed[one], lengths[one], causal), together, strict=True):
                assert torch.equal(got, wanted[one])


@pytest.mark.skipif(not CPU_ROUTES, reason=str(extension.missing()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_addresses_and_more_keys_than_a_block(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    flat = torch.randn(1 + 1201 * 2 * 32 * 3, dtype=dtype)
    q, k, v = flat[1:].view(3, 1, 1201, 2, 32)
    with route("cpu", op.FORWARD):
        got = attention(q, k, v, int32([1150]), True)
    low, exact = (plain(q.to(t), k.to(t), v.to(t), int32([1150]), True, 0.0) for t in (dtype, torch.float64))
    assert_as_good_as(got, low, exact)


@pytest.mark.parametrize("way", [*CPU_ROUTES, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 7])
def test_nan_and_infinity(queries: int, dtype: torch.dtype, way: str) -> None:
    inf, nan = float("inf"), float("nan")
    q, k, v = torch.ones(5, queries, 2, 32, dtype=dtype), torch.ones(5, 9, 2, 32, dtype=dtype), torch.ones(5, 9, 2, 32)
    v = v.to(dtype)
    k[0, 3, 0, 5] = nan  # a key of head 0: NaN for all its queries, head 1 untouched
    k[1, 3, 0, 5] = -inf  # a key of weight 0
    k[2, 3, 0, 5] = inf  # NaN, as inf - inf is
    k[3, :, 0, 5] = -inf  # nothing but -inf: NaN, as torch.softmax gives
    q[4, -1, 0, 5] = nan  # that query alone
    with route(way, op.FORWARD):
        out = attention(q, k, v)
    expected = torch.ones_like(out)
    expected[0, :, 0] = expected[2, :, 0] = expected[3, :, 0] = expected[4, -1, 0] = nan
    assert_close(out, expected, equal_nan=True, atol=1e-2, rtol=0)
    k[:] = 1
    k[:, :3, 0, 5] = -inf  # all that is visible, in head 0, to whom a length or the diagonal shows no more
    q.nan_to_num_(nan=1.0)
    with route(way, op.FORWARD):
        padded, causal = attention(q, k, v, int32([3, 2, 0, 4, 9])), attention(q, k[:, :7], v[:, :7], causal=True)
    assert padded[:2, :, 0].isnan().all() and not padded[2].any() and padded[3:].isfinite().all()
    assert padded[:, :, 1].isfinite().all() and causal[:, :, 1].isfinite().all()
    assert causal[:, :, 0].isnan().all(-1).equal((torch.arange(queries) < queries - 4).expand(5, -1))


_EVERY_ISA = """
import torch
from miss.kernels.attention import attention
from miss.kernels.cross_attention import KV, Tokens, cross_attention
from miss.kernels.decode_attention import decode_attention
from miss.kernels.registry import use

def both(function, *tensors):
    results = []
    for way in ("cpu", "reference"):
        with use(attention=way, cross_attention=way, cross_attention_tokens=way, decode_attention=way):
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = function(*leaves)
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out)) if out.requires_grad else ()
            results.append((out, *grads))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)

torch.manual_seed(0)
index, lengths = torch.tensor([0, 0, 1], dtype=torch.int32), torch.tensor([67, 30], dtype=torch.int32)
for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 4e-2)):
    for width in (32, 64):
        x = torch.randn(2, 67, 3, 2, width).to(dtype)
        both(lambda x: attention(*x.unbind(2), lengths, True, None, 0.2, 5), x)
        for tokens in (1, 7):
            q, kv = torch.randn(3, tokens, 5, width).to(dtype), torch.randn(2, 67, 2, 5, width).to(dtype)
            both(lambda q, kv: cross_attention(q, KV(*kv.unbind(2)), index, lengths), q, kv)
        w = (torch.randn(2, 5 * width, 64) / 8).to(dtype)
        with torch.no_grad():
            rows = x[:, :, 0, :, :32].flatten(2)
            both(lambda q, x, w: cross_attention(q, Tokens(x, w[0], w[1], None), index, lengths), q, rows, w)
            both(lambda q, kv: decode_attention(q[:, 0], *kv.unbind(2), index, lengths[index.long()]), q, kv)
"""


@pytest.mark.skipif(not CPU_ROUTES, reason=str(extension.missing()))
@pytest.mark.parametrize("isa", ["avx2", "avx512f"])
def test_every_instruction_set(isa: str) -> None:
    if isa not in extension.report().supported:
        pytest.skip(f"this processor has no {isa}")
    environment = {**os.environ, "MISS_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", _EVERY_ISA], env=environment, check=True)


def test_dropout_is_decided_by_its_seed() -> None:
    q, k, v = (torch.randn(2, 9, 2, 32) for _ in range(3))

    def run(seed: Tensor | int | None) -> Tensor:
        return attention(q, k, v, dropout_p=0.5, seed=seed)

    assert torch.equal(run(5), run(torch.tensor(5))) and not torch.equal(run(5), run(6))
    torch.manual_seed(1)
    drawn, other = run(None), run(None)
    torch.manual_seed(1)
    assert torch.equal(drawn, run(None)) and not torch.equal(drawn, other)
    assert torch.equal(attention(q, k, v, seed=5), attention(q, k, v))
    mean = torch.stack([run(seed) for seed in range(400)]).mean(0)
    assert (mean - attention(q, k, v)).abs().mean() < 0.1 * mean.abs().mean()


@pytest.mark.parametrize("causal", [False, True])
def test_explicit_gradient_against_finite_differences(causal: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4)]
    for way in ("reference", "custom"):
        with route(way, op.FORWARD):
            assert torch.autograd.gradcheck(
                lambda q, k, v: attention(q, k, v, int32([4, 2]), causal, None, P, SEED), leaves
            )


@pytest.mark.parametrize(("lengths", "dropout_p"), [(None, 0.0), (int32([5, 2]), P)])
def test_opcheck(lengths: Tensor | None, dropout_p: float) -> None:
    q, k, v = torch.randn(2, 5, 3, 2, 32, requires_grad=True).unbind(2)
    seed = as_seed(SEED, dropout_p)
    torch.library.opcheck(op._forward, (q, k, v, lengths, True, 0.2, dropout_p, seed))
    tensors = [t.detach() for t in (q, q, k, v, q)]
    torch.library.opcheck(op._backward, (*tensors, torch.randn(2, 2, 5), lengths, True, 0.2, dropout_p, seed))


def test_compiles_without_a_break() -> None:
    packed = torch.randn(2, 6, 3, 2, 32, requires_grad=True)

    def step(packed: Tensor, lengths: Tensor) -> Tensor:
        return attention(*packed.unbind(2), lengths, True, None, P, SEED).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (6, 7):
        packed = torch.randn(2, length, 3, 2, 32, requires_grad=True)
        expected, got = (f(packed, int32([length, 2])) for f in (step, compiled))
        assert_close(got, expected)
        assert_close(torch.autograd.grad(got, packed), torch.autograd.grad(expected, packed))


@pytest.mark.parametrize("way", ROUTES)
def test_autocast(way: str) -> None:
    packed = torch.randn(2, 6, 3, 2, 32, requires_grad=True)
    with route(way, op.FORWARD), torch.autocast("cpu", torch.bfloat16):
        out = attention(*packed.unbind(2), int32([6, 2]))
        (grad,) = torch.autograd.grad(out, packed, torch.ones_like(out))
        if way != "cpu":
            assert attention(*packed.double().unbind(2)).dtype == torch.float64
    assert out.dtype == torch.bfloat16 and grad.dtype == torch.float32
    exact = plain(*packed.double().unbind(2), int32([6, 2]), False, 0.0)
    assert_as_good_as(out, plain(*packed.bfloat16().unbind(2), int32([6, 2]), False, 0.0), exact)


def test_probabilities() -> None:
    q, k, v = (torch.randn(2, n, 2, 32) for n in (3, 5, 5))
    p = attention_probabilities(q, k, int32([5, 0]), causal=True)
    assert p.shape == (2, 2, 3, 5) and p.dtype == torch.float32
    assert_close(p[0].sum(-1), torch.ones(2, 3))
    assert not p[1].any() and not p[0, :, 0, 3:].any()
    assert_close(torch.einsum("bhtn,bnhd->bthd", p, v), attention(q, k, v, int32([5, 0]), causal=True))


def test_errors_say_what_was_wanted() -> None:
    q, k = torch.randn(2, 3, 2, 32), torch.randn(2, 2, 2, 32)
    for wrong in (k[:1], k[:, :, :1], k[..., :8], k[0]):
        with pytest.raises(ValueError, match=r"wanted \(B, T, H, D\)"):
            attention(q, wrong, wrong)
    with pytest.raises(ValueError, match="one a row"):
        attention(q, k, k, int32([1]))
    with pytest.raises(ValueError, match="3 queries over 2 keys"):
        attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match="dropout_p"):
        attention(q, k, k, dropout_p=1.0)


# Packed sequences


def sequence_by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, keep: Tensor) -> Tensor:
    """Textbook attention of each sequence alone; `keep` (total, H, max_length) multiplies the probabilities."""
    outputs = [q[:0]]
    for qs, ks, vs, kept in zip(*(t.split(lengths) for t in (q, k, v, keep)), strict=True):
        scores = torch.einsum("thd,nhd->htn", qs, ks) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(len(qs), len(qs)).tril() == 0, float("-inf"))
        p = torch.softmax(scores, -1) * kept[..., : len(qs)].transpose(0, 1).to(q.dtype)
        outputs.append(torch.einsum("htn,nhd->thd", p, vs))
    return torch.cat(outputs)


def check_varlen(lengths: list[int], slack: int, causal: bool, dropout_p: float, way: str, dtype: torch.dtype) -> None:
    total, max_length = sum(lengths), max([0, *lengths]) + slack
    offsets = int32([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    keep = torch.ones(total, 2, max_length)
    if dropout_p:
        seed = as_seed(SEED, dropout_p)
        assert seed is not None
        keep = keep_mask(seed, keep.shape, dropout_p, keep.device) / (1 - dropout_p)
    torch.manual_seed(0)
    with route(way, op.VARLEN_FORWARD):
        check_error_rule(
            lambda packed: attention_varlen(*packed.unbind(1), offsets, max_length, causal, None, dropout_p, seed=SEED),
            lambda packed: sequence_by_sequence(*packed.unbind(1), lengths, causal, keep),
            [torch.randn(total, 3, 2, 32)],
            dtype,
            slack=3.0,
        )


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("lengths", [[7, 1, 20], [5, 5, 5], [0, 13, 0, 0, 2], [], [0], [197]], ids=str)
def test_varlen_error_rule(lengths: list[int], way: str) -> None:
    check_varlen(lengths, 0, False, 0.0, way, torch.float32)
    check_varlen(lengths, 3, True, P, way, torch.bfloat16)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=6),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([0.0, P]),
    st.sampled_from(ROUTES),
)
def test_varlen_any_packing(lengths: list[int], slack: int, causal: bool, dropout_p: float, way: str) -> None:
    check_varlen(lengths, slack, causal, dropout_p, way, torch.float32)


def test_varlen_explicit_gradient_against_finite_differences() -> None:
    leaves = [torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for way in ("reference", "custom"):
        with route(way, op.VARLEN_FORWARD):
            assert torch.autograd.gradcheck(
                lambda q, k, v: attention_varlen(q, k, v, int32([0, 4, 4, 6]), 5, True, None, P, SEED), leaves
            )


def test_varlen_opcheck_and_compile() -> None:
    q, k, v = torch.randn(9, 3, 2, 32, requires_grad=True).unbind(1)
    offsets, seed = int32([0, 4, 9]), as_seed(SEED, P)
    torch.library.opcheck(op._varlen_forward, (q, k, v, offsets, 5, True, 0.2, P, seed))
    tensors = [t.detach() for t in (q, q, k, v, q)]
    torch.library.opcheck(op._varlen_backward, (*tensors, torch.randn(9, 2), offsets, 5, True, 0.2, P, seed))

    def step(packed: Tensor, offsets: Tensor) -> Tensor:
        return attention_varlen(*packed.unbind(1), offsets, 5, True).square().sum()

    packed = torch.randn(9, 3, 2, 32, requires_grad=True)
    expected, got = (f(packed, offsets) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, packed), torch.autograd.grad(expected, packed))


def test_varlen_errors_say_what_was_wanted() -> None:
    q = torch.randn(9, 2, 32)
    for offsets in ([0, 4], [1, 9], [0, 5, 4, 9]):
        with pytest.raises(ValueError, match="rise from 0 to 9"):
            attention_varlen(q, q, q, int32(offsets), 9)
    with pytest.raises(ValueError, match="a sequence of 5 rows; max_length is 4"):
        attention_varlen(q, q, q, int32([0, 4, 9]), 4)
    with pytest.raises(ValueError, match=r"wanted \(total, H, D\)"):
        attention_varlen(q, q[:3], q, int32([0, 9]), 9)
