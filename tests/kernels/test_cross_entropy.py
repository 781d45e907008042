"""Linear and cross entropy, by the error rule; what it keeps and what it never touches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from miss.kernels import extension
from miss.kernels.cross_entropy import linear_cross_entropy, op, torch_impl
from tests.helpers import assert_as_good_as, check_error_rule, route, threads

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUTES = ["torch", "reference", "custom", "cpu"]
ROUTED = [(name, dtype) for name in ROUTES for dtype in DTYPES if name != "cpu" or dtype in op.CPU_DTYPES]
# rows, width, vocabulary, share ignored
SIZES = [(37, 16, 1021, 0.4), (1, 8, 7, 0.0), (197, 24, 101, 0.7), (13, 8, 5, 1.0), (0, 8, 5, 0.0)]


def tensors(rows: int, width: int, vocabulary: int, ignored: float) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    inputs = [torch.randn(rows, width), torch.randn(vocabulary, width) * width**-0.5, torch.randn(vocabulary) * 0.1]
    return inputs, labels


def plain(hidden, weight, bias, labels, label_smoothing=0.0, ignore_index=-100):
    logits = F.linear(hidden, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index)


@pytest.mark.parametrize(("name", "dtype"), ROUTED, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_rule(size, smoothing, name, dtype):
    inputs, labels = tensors(*size)
    with route(name, op.FORWARD):
        check_error_rule(
            lambda h, w, b: linear_cross_entropy(h, w, b, labels, smoothing),
            lambda h, w, b: plain(h, w, b, labels, smoothing),
            inputs,
            dtype,
            floor=1e-12 if dtype == torch.float64 else 1e-6,
        )


@pytest.mark.parametrize("name", ROUTES)
def test_without_bias_other_ignore_index_and_any_strides(name):
    (h, w, _), labels = tensors(37, 16, 101, 0.0)
    labels[::3] = 0
    h, w = h.T.contiguous().T, torch.cat([w, w], 1)[:, ::2]
    assert not h.is_contiguous() and not w.is_contiguous()
    with route(name, op.FORWARD):
        check_error_rule(
            lambda h, w: linear_cross_entropy(h, w, None, labels, 0.2, 0),
            lambda h, w: plain(h, w, None, labels, 0.2, 0),
            [h, w],
            torch.float32,
        )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 17),
    vocabulary=st.integers(1, 33),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_size(rows, width, vocabulary, ignored, smoothing):
    (h, w, b), labels = tensors(rows, width, vocabulary, ignored)
    exact = plain(h.double(), w.double(), b.double(), labels, smoothing)
    for name in ("torch", "reference", "cpu"):
        with route(name, op.FORWARD):
            got = linear_cross_entropy(h, w, b, labels, smoothing)
        assert got.dtype == torch.float32 and (got[labels == -100] == 0).all()
        assert_as_good_as(got, plain(h, w, b, labels, smoothing), exact, slack=4, floor=3e-6)


@pytest.mark.parametrize("name", ROUTES[:3])  # `cpu` takes what fits into one part
def test_parts_and_blocks_change_nothing(name, monkeypatch):
    """Row counts that do not divide into the blocks, in forward and backward."""
    inputs, labels = tensors(23, 8, 50, 0.2)
    monkeypatch.setattr(torch_impl, "PART", 7 * 50)
    monkeypatch.setitem(torch_impl.BLOCK, "cpu", 3 * 50)
    for dtype in (torch.float32, torch.bfloat16):
        with route(name, op.FORWARD):
            check_error_rule(
                lambda h, w, b: linear_cross_entropy(h, w, b, labels, 0.1),
                lambda h, w, b: plain(h, w, b, labels, 0.1),
                inputs,
                dtype,
            )


@pytest.mark.parametrize("name", ROUTES)
def test_ignored_rows_are_never_read(name):
    """Compacted away before the product: not even a NaN in them shows, in the loss or in any gradient."""
    (h, w, b), labels = tensors(9, 8, 11, 0.0)
    labels[2] = labels[5] = -100
    h[2] = float("nan")
    leaves = [t.requires_grad_() for t in (h, w, b)]
    with route(name, op.FORWARD):
        loss = linear_cross_entropy(*leaves, labels)
        grads = torch.autograd.grad(loss.sum(), leaves)
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert (grads[0][[2, 5]] == 0).all()


@pytest.mark.parametrize(("name", "shape"), [("torch", (16, 1000)), ("cpu", (1000, 16))])
def test_saves_no_float32_logits_and_none_of_ignored_rows(name, shape):
    (h, w, b), labels = tensors(64, 8, 1000, 0.0)
    labels[16:] = -100
    leaves = [t.bfloat16().requires_grad_() for t in (h, w, b)]
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with route(name, op.FORWARD), hooks:
        linear_cross_entropy(*leaves, labels, 0.1)
    wide = [t for t in saved if t.numel() >= 16 * 1000]
    assert [(tuple(t.shape), t.dtype) for t in wide] == [(shape, torch.bfloat16)]


def test_large_logits_do_not_overflow():
    h, w, labels = torch.full((3, 4), 100.0), torch.randn(6, 4) * 10, torch.tensor([0, 3, 5])
    for name in ROUTES:
        with route(name, op.FORWARD):
            got = linear_cross_entropy(h, w, None, labels, 0.1)
        torch.testing.assert_close(got, plain(h, w, None, labels, 0.1), rtol=1e-5, atol=1e-3)


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    (h, w, b), labels = tensors(19, 16, 101, 0.3)
    wanted = linear_cross_entropy(h.bfloat16(), w.bfloat16(), b.bfloat16(), labels, 0.1)
    w.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ROUTES:
            with route(name, op.FORWARD):
                got = linear_cross_entropy(h, w, b, labels, 0.1)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, wanted, rtol=0, atol=3e-2)
            assert torch.autograd.grad(got.sum(), w)[0].dtype == torch.float32


def test_bad_arguments():
    (h, w, b), labels = tensors(5, 8, 11, 0.0)
    for bad in ((h[0], w, b, labels), (h, w[:, 1:], b, labels), (h, w, b[1:], labels), (h, w, b, labels.int())):
        with pytest.raises(ValueError, match="wanted"):
            linear_cross_entropy(*bad)
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(h, w, b, labels, 1.5)


def test_opcheck():
    (h, w, b), labels = tensors(9, 8, 11, 0.3)
    torch.library.opcheck(op._forward, (*(t.requires_grad_() for t in (h, w, b)), labels, 0.1, -100))
    checks = ("test_schema", "test_faketensor")
    for name in ROUTES[:2]:
        with route(name, op.FORWARD):
            for dtype in DTYPES:
                h, w, b = (t.detach().to(dtype) for t in (h, w, b))
                torch.library.opcheck(op._forward, (h, w, None, labels, 0.0, -100), test_utils=checks)
                loss, lse = op.FORWARD(h, w, b, labels, 0.1, -100)
                torch.library.opcheck(op._backward, (loss, h, w, b, labels, lse, 0.1, -100), test_utils=checks)


def test_compiles_without_a_break():
    (h, w, b), labels = tensors(9, 8, 11, 0.3)
    leaves = [t.requires_grad_() for t in (h, w, b)]

    def function(labels):
        return linear_cross_entropy(*leaves, labels, 0.1).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for each in (labels, labels.roll(1), torch.full_like(labels, -100)):
        got, wanted = compiled(each), function(each)
        torch.testing.assert_close(got, wanted)
        for g, e in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_row_does_not_see_its_batch_or_the_threads(dtype):
    """More rows than a panel and more tokens than a block; what sums over the rows depends on them, of course."""
    inputs, labels = tensors(131, 40, 1021, 0.2)
    h, w, b = (t.to(dtype).requires_grad_() for t in inputs)

    def run(rows: slice) -> list[Tensor]:
        loss = linear_cross_entropy(h[rows], w, b, labels[rows], 0.1)
        return [loss, *torch.autograd.grad(loss.sum(), (w, b))]

    with route("cpu", op.FORWARD):
        whole = run(slice(None))
        for count in (2, 3):
            with threads(count):
                assert all(map(torch.equal, run(slice(None)), whole))
        for rows in (slice(0, 1), slice(60, 70), slice(130, 131)):
            assert torch.equal(run(rows)[0], whole[0][rows])
        with torch.no_grad():  # without the logits being kept
            assert torch.equal(linear_cross_entropy(h, w, b, labels, 0.1), whole[0])


def test_cpu_nan_stays_in_its_row_and_minus_infinity_is_no_token():
    (h, w, b), labels = tensors(9, 8, 101, 0.0)
    labels[:] = 3
    b[50:] = float("-inf")
    with route("cpu", op.FORWARD):
        got = linear_cross_entropy(h, w, b, labels)
        torch.testing.assert_close(got, plain(h, w[:50], b[:50], labels))
        h[2] = float("nan")
        bad = linear_cross_entropy(h, w, b, labels)
    assert bad[2].isnan() and torch.equal(bad[[0, 1, *range(3, 9)]], got[[0, 1, *range(3, 9)]])
    if not extension.missing():
        with route("cpu", op.FORWARD), pytest.raises(RuntimeError, match="label 101 is not in 0 … 100"):
            linear_cross_entropy(h, w, b, labels + 98)
