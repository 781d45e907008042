"""Cross-attention over indexed sources, both forms: the error rule, groups of any size, what is never repeated."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from miss.kernels.cross_attention import KV, Tokens, cross_attention, op, torch_impl
from miss.kernels.dropout import as_seed, keep_mask
from tests.helpers import CPU_ROUTES, assert_as_good_as, check_error_rule, route

OTHER_ROUTES = ["torch", "reference", "custom"]
ROUTES = [*CPU_ROUTES, *OTHER_ROUTES]
SEED, P = 23, 0.3
CHANNELS = 64  # what the CPU kernels take a multiple of
PATTERNS = {
    "one-each": [1, 1, 1],
    "even": [2, 2, 2],
    "uneven": [3, 1, 2],
    "some-without": [0, 4, 0, 1, 0],
    "one-with-many": [9],
    "none": [0, 0],
}


def index_of(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64)).int()


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def plain(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, lengths: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """A textbook's cross-attention, every row with a copy of its source, in the dtype of its inputs."""
    k, v = k[index], v[index]
    scores = torch.einsum("rthd,rnhd->rhtn", q, k) / q.shape[-1] ** 0.5
    hidden = torch.zeros(len(q), 1, 1, k.shape[1], dtype=torch.bool)
    if lengths is not None:
        hidden = torch.arange(k.shape[1]) >= lengths[index].view(-1, 1, 1, 1)
    p = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    p = torch.where(hidden.all(-1, keepdim=True), 0.0, p)
    if dropout_p:
        seed = as_seed(SEED, dropout_p)
        assert seed is not None
        p = p * keep_mask(seed, p.shape, dropout_p, p.device).to(p.dtype) / (1 - dropout_p)
    return torch.einsum("rhtn,rnhd->rthd", p, v)


def plain_tokens(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    index: Tensor,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    heads = (q.shape[2], q.shape[3])
    k, v = torch.nn.functional.linear(x, w_k), torch.nn.functional.linear(x, w_v, b_v)
    return plain(q, k.unflatten(-1, heads), v.unflatten(-1, heads), index, lengths, dropout_p)


@contextmanager
def both(way: str) -> Iterator[None]:
    with route(way, op.FORWARD), route(way, op.TOKENS_FORWARD):
        yield


@contextmanager
def loop_worth(value: float) -> Iterator[None]:
    """What decides between padding uneven groups and looping over images: 0 loops, infinity pads."""
    before, torch_impl._LOOP_WORTH = torch_impl._LOOP_WORTH, value  # type: ignore[assignment]
    try:
        yield
    finally:
        torch_impl._LOOP_WORTH = before


Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


def kv_case(counts: list[int], shape: tuple[int, int, int, int], lengths: Tensor | None, dropout_p: float) -> Case:
    queries, keys, heads, width = shape
    index = index_of(counts)

    def ours(q: Tensor, kv: Tensor) -> Tensor:  # strided views of the one projection of all layers
        return cross_attention(q, KV(kv[:, :, 1], kv[:, :, 2]), index, lengths, None, dropout_p, SEED)

    def textbook(q: Tensor, kv: Tensor) -> Tensor:
        return plain(q, kv[:, :, 1], kv[:, :, 2], index, lengths, dropout_p)

    q = torch.randn(len(index), queries, heads, width)
    return ours, textbook, [q, torch.randn(len(counts), keys, 3, heads, width)]


def tokens_case(
    counts: list[int], shape: tuple[int, int, int, int], lengths: Tensor | None, dropout_p: float, bias: bool = True
) -> Case:
    queries, keys, heads, width = shape
    channels, inner = CHANNELS, heads * width
    index = index_of(counts)

    def ours(q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, b_v: Tensor | None = None) -> Tensor:
        return cross_attention(q, Tokens(x, w_k, w_v, b_v), index, lengths, None, dropout_p, SEED)

    def textbook(q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, b_v: Tensor | None = None) -> Tensor:
        return plain_tokens(q, x, w_k, w_v, b_v, index, lengths, dropout_p)

    q, x = torch.randn(len(index), queries, heads, width), torch.randn(len(counts), keys, channels)
    weights = [torch.randn(inner, channels) / channels**0.5 for _ in range(2)]
    return ours, textbook, [q, x, *weights, *([torch.randn(inner)] if bias else [])]


CASES = {"kv": kv_case, "tokens": tokens_case}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("form", CASES)
def test_error_rule(form: str, pattern: str, way: str, dtype: torch.dtype) -> None:
    counts = PATTERNS[pattern]
    lengths = int32([13, 5, 0, 1, 7][: len(counts)])
    for valid, dropout_p, worth in ((None, 0.0, 0.0), (lengths, 0.0, 1e18), (lengths, P, 0.0), (None, P, 1e18)):
        if way == "cpu" and form == "tokens" and dropout_p:
            continue  # refused
        torch.manual_seed(0)
        ours, textbook, inputs = CASES[form](counts, (7, 13, 2, 32), valid, dropout_p)
        with both(way), loop_worth(worth):
            check_error_rule(
                ours, textbook, inputs, dtype, slack=2.5
            )  # the largest of few numbers is a noisy yardstick


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 197, 257, 577, 901])
@pytest.mark.parametrize("form", CASES)
def test_error_rule_at_image_lengths(form: str, keys: int, dtype: torch.dtype) -> None:
    for way, counts, width in (("torch", [2, 1], 64), ("custom", [2, 2], 32), *((w, [3, 1], 64) for w in CPU_ROUTES)):
        torch.manual_seed(0)
        ours, textbook, inputs = CASES[form](counts, (5, keys, 1, width), None, 0.0)
        with both(way):
            # Over one key the gradients of q and w_k are 0, exactly so in plain PyTorch, to rounding when absorbed.
            check_error_rule(ours, textbook, inputs, dtype, slack=2.5, floor=5e-6 if keys == 1 else 1e-6)


@pytest.mark.parametrize("way", ROUTES)
def test_tokens_without_a_bias(way: str) -> None:
    torch.manual_seed(0)
    for dropout_p in (0.0,) if way == "cpu" else (0.0, P):
        with both(way):
            check_error_rule(*tokens_case([2, 1], (3, 9, 2, 32), int32([4, 9]), dropout_p, bias=False), torch.float32)


def test_tokens_of_any_width() -> None:
    torch.manual_seed(0)
    ours, textbook, (q, x, w_k, w_v, b_v) = tokens_case([2, 1], (3, 9, 2, 32), int32([4, 9]), 0.0)
    with route("torch", op.TOKENS_FORWARD):
        check_error_rule(ours, textbook, [q, x[..., :40], w_k[:, :40], w_v[:, :40], b_v], torch.float32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_groups_and_lengths(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5), label="rows of each image")
    keys = data.draw(st.integers(1, 20))
    valid = None
    if data.draw(st.booleans()):
        valid = int32(data.draw(st.lists(st.integers(0, keys), min_size=len(counts), max_size=len(counts))))
    form, way = data.draw(st.sampled_from(list(CASES))), data.draw(st.sampled_from(ROUTES))
    width = data.draw(st.sampled_from([32, 64] if way == "cpu" else [32, 64, 5]))
    shape = (data.draw(st.integers(1, 9)), keys, data.draw(st.integers(1, 3)), width)
    dropped = [0.0] if way == "cpu" and form == "tokens" else [0.0, P]
    dropout_p, worth = data.draw(st.sampled_from(dropped)), data.draw(st.sampled_from([0.0, 1e5, 1e18]))
    torch.manual_seed(0)
    ours, textbook, inputs = CASES[form](counts, shape, valid, dropout_p)
    with both(way), loop_worth(worth):
        # (the floor: of a source with one key, see above)
        check_error_rule(ours, textbook, inputs, torch.float32, slack=4.0, floor=5e-6)


class Sizes(TorchDispatchMode):
    """The largest tensor that any PyTorch operation makes, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("counts", [[12, 12, 12], [20, 1, 15], [36]], ids=str)
@pytest.mark.parametrize("form", CASES)
def test_no_source_is_repeated(form: str, counts: list[int]) -> None:
    """With far more rows than images, nothing as large as every row's own copy of its source is ever made."""
    ours, _, inputs = CASES[form](counts, (1, 300, 2, 32), None, 0.0)
    copies = sum(counts) * inputs[1][0].numel() // (3 if form == "kv" else 1)
    with Sizes() as sizes, route("torch", op.FORWARD), route("torch", op.TOKENS_FORWARD):
        leaves = [t.requires_grad_() for t in inputs]
        torch.autograd.grad(ours(*leaves).sum(), leaves)
    assert sizes.largest < copies / 3, f"a tensor of {sizes.largest} values; copies would have {copies}"


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("form", CASES)
def test_sources_of_length_zero(form: str, way: str) -> None:
    ours, _, inputs = CASES[form]([1, 2, 1], (4, 6, 2, 32), int32([0, 6, 0]), 0.0)
    leaves = [t.requires_grad_() for t in inputs]
    with both(way):
        out = ours(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not out[0].any() and not out[3].any() and out[1:3].any()
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0].any() and not grads[1][0].any() and not grads[1][2].any() and grads[1][1].any()


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("form", CASES)
def test_a_row_does_not_depend_on_its_batch(form: str, way: str) -> None:
    """Alone, among siblings of its image, in even or uneven company, padded or looped: the same to rounding."""
    torch.manual_seed(0)
    index, lengths = index_of([1, 4, 0, 2]), int32([11, 3, 8, 11])
    _, _, (q, source, *weights) = CASES[form]([1, 4, 0, 2], (5, 11, 2, 32), None, 0.0)

    def run(q: Tensor, images: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
        made = KV(images[:, :, 1], images[:, :, 2]) if form == "kv" else Tokens(images, *weights)
        return cross_attention(q, made, index, lengths)

    with both(way):
        for worth, count in itertools.product((0.0, 1e18), (7, 5, 3)):
            with loop_worth(worth):
                together = run(q[:count], source, index[:count], lengths)
            for row, image in enumerate(index[:count].tolist()):
                one = slice(image, image + 1)
                alone = run(q[row : row + 1], source[one], int32([0]), lengths[one])
                assert_close(together[row], alone[0], atol=2e-6, rtol=1e-5)


@pytest.mark.skipif(not CPU_ROUTES, reason="the CPU kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("form", CASES)
def test_bitwise_the_same_whatever_rows_share_an_image(form: str, queries: int, dtype: torch.dtype) -> None:
    counts = [1, 20, 0, 2]
    torch.manual_seed(0)
    index, lengths = index_of(counts), int32([71, 33, 8, 71])
    _, _, inputs = CASES[form](counts, (queries, 71, 3, 32), None, 0.0)
    q, source, *weights = (t.to(dtype) for t in inputs)

    def run(q: Tensor, images: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
        made = KV(images[:, :, 1], images[:, :, 2]) if form == "kv" else Tokens(images, *weights)
        return cross_attention(q, made, index, lengths)

    before = torch.get_num_threads()
    with both("cpu"):
        together = run(q, source, index, lengths)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(q, source, index, lengths)
            torch.set_num_threads(before)
            assert torch.equal(again, together)
        for row, image in enumerate(index.tolist()):
            one = slice(image, image + 1)
            assert torch.equal(run(q[row : row + 1], source[one], int32([0]), lengths[one])[0], together[row])


@pytest.mark.parametrize("form", CASES)
def test_dropout_does_not_depend_on_the_form_of_the_groups(form: str) -> None:
    torch.manual_seed(0)
    ours, _, inputs = CASES[form]([3, 1, 2], (4, 9, 2, 32), None, P)
    with both("torch"):
        with loop_worth(0.0):
            looped = ours(*inputs)
        with loop_worth(1e18):
            padded = ours(*inputs)
    with both("reference"):
        assert_close(looped, ours(*inputs), atol=1e-5, rtol=1e-5)
    assert_close(looped, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["gathered", "looped", "padded"])
def test_every_form_of_groups(form: str) -> None:
    """`gathered` is what CUDA takes, where the host may not read the index: the same arithmetic on any device."""
    torch.manual_seed(0)
    index, lengths = index_of([3, 0, 2]), int32([9, 4, 6])
    q, dout = torch.randn(2, 5, 4, 2, 32, dtype=torch.float64)
    k, v = torch.randn(2, 3, 9, 2, 32, dtype=torch.float64)
    keep = (torch.rand(5, 2, 4, 9) > 0.2).double() / 0.8
    groups = torch_impl.Groups(index, 3, 0 if form == "padded" else 1 << 40)
    if form == "gathered":
        groups.form = form
    assert groups.form == form
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = torch_impl.attend_rows(*leaves, groups, lengths, 32**-0.5, keep)
    grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    explicit = torch_impl.attend_rows_backward(dout, *(t.detach() for t in leaves), groups, lengths, 32**-0.5, keep)
    assert_close(explicit, grads)
    p = torch.softmax(
        (torch.einsum("rthd,rnhd->rhtn", q, k[index]) * 32**-0.5).masked_fill(
            torch.arange(9) >= lengths[index].view(-1, 1, 1, 1), float("-inf")
        ),
        -1,
    )
    assert_close(out, torch.einsum("rhtn,rnhd->rthd", p * keep, v[index]))


@pytest.mark.parametrize("form", CASES)
def test_explicit_gradient_against_finite_differences(form: str) -> None:
    torch.manual_seed(0)
    ours, _, inputs = CASES[form]([2, 0, 1], (2, 4, 2, 3), int32([4, 4, 2]), P)
    if form == "tokens":
        inputs = [t[..., :5] if 0 < i < 4 else t for i, t in enumerate(inputs)]
    leaves = [t.double().requires_grad_() for t in inputs]
    for way in ("reference", "custom"):
        with both(way):
            assert torch.autograd.gradcheck(ours, leaves, fast_mode=True)


@pytest.mark.parametrize(("lengths", "dropout_p", "bias"), [(None, 0.0, False), (int32([4, 2]), P, True)])
def test_opcheck(lengths: Tensor | None, dropout_p: float, bias: bool) -> None:
    index, seed = index_of([2, 1]), as_seed(SEED, dropout_p)
    q, lse = torch.randn(3, 3, 2, 32, requires_grad=True), torch.randn(3, 2, 3)
    kv = torch.randn(2, 5, 2, 2, 32, requires_grad=True)
    rest = (index, lengths, 0.2, dropout_p, seed)
    k, v = kv.unbind(2)
    torch.library.opcheck(op._forward, (q, k, v, *rest))
    torch.library.opcheck(op._backward, (*(t.detach() for t in (q, q, k, v, q)), lse, *rest))
    x, w_k, w_v = (torch.randn(s, requires_grad=True) for s in ((2, 5, 20), (64, 20), (64, 20)))
    b_v = torch.randn(64, requires_grad=True) if bias else None
    torch.library.opcheck(op._tokens_forward, (q, x, w_k, w_v, b_v, *rest))
    tensors = [None if t is None else t.detach() for t in (q, q, x, w_k, w_v, b_v, q)]
    torch.library.opcheck(op._tokens_backward, (*tensors, lse, *rest))


@pytest.mark.parametrize("form", CASES)
def test_compiles_without_a_break(form: str) -> None:
    ours, _, inputs = CASES[form]([2, 0, 1], (3, 5, 2, 32), int32([5, 2, 3]), P)
    leaves = [t.requires_grad_() for t in inputs]

    def step(*leaves: Tensor) -> Tensor:
        return ours(*leaves).square().sum()

    expected, got = (f(*leaves) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("form", CASES)
def test_autocast(form: str, way: str) -> None:
    torch.manual_seed(0)
    ours, textbook, inputs = CASES[form]([2, 1], (3, 5, 2, 32), int32([5, 2]), 0.0)
    leaves = [t.requires_grad_() for t in inputs]
    with both(way), torch.autocast("cpu", torch.bfloat16):
        out = ours(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    assert_as_good_as(out, textbook(*(t.bfloat16() for t in leaves)), textbook(*(t.double() for t in leaves)))


@pytest.mark.parametrize("way", [*CPU_ROUTES, "torch", "reference"])
def test_an_index_that_is_unsorted_or_out_of_range(way: str) -> None:
    q, kv = torch.randn(3, 2, 2, 32), torch.randn(2, 5, 2, 32)
    with both(way):
        for wrong, message in (([0, 1, 0], "is 0 after 1"), ([0, 1, 2], "is 2; wanted 0 to 1"), ([-1, 0, 1], "is -1")):
            with pytest.raises(ValueError, match=message):
                cross_attention(q, KV(kv, kv), int32(wrong))


def test_errors_say_what_was_wanted() -> None:
    q, kv, index = torch.randn(3, 2, 2, 32), torch.randn(2, 5, 2, 32), int32([0, 0, 1])
    x, w = torch.randn(2, 5, 24), torch.randn(64, 24)
    for k, v in ((kv, kv[:1]), (kv[..., :8], kv[..., :8]), (kv[0], kv[0])):
        with pytest.raises(ValueError, match=r"wanted q \(R, T, H, D\), k, v"):
            cross_attention(q, KV(k, v), index)
    for source in (Tokens(x, w, w[:9], None), Tokens(x, w, w, torch.randn(24)), Tokens(x[0], w, w, None)):
        with pytest.raises(ValueError, match=r"x \(I, N, C\)"):
            cross_attention(q, source, index)
    with pytest.raises(ValueError, match=r"wanted \(3,\)"):
        cross_attention(q, KV(kv, kv), int32([0, 1]))
    with pytest.raises(ValueError, match=r"lengths is \(3,\); wanted \(2,\)"):
        cross_attention(q, KV(kv, kv), index, index)
