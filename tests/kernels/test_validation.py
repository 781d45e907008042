"""Measuring a row: the error rule, failures, what is changed in place, gradients. On the CPU, with rows made for it."""

import time
from collections.abc import Iterator

import pytest
import torch

from miss.kernels import registry
from miss.kernels.kv_cache import kv_append
from miss.kernels.layer_norm import layer_norm
from miss.kernels.registry import ALL_FLOATS, OPS, Impl, Op
from miss.kernels.validation import QUICK, Call, blank, gather, mapped, measure, ours, tensors

X = torch.linspace(-3, 3, 2000)


def slow(x):
    time.sleep(0.002)
    return x.exp()


@pytest.fixture
def toy() -> Iterator[Op]:
    """A table whose first row a test chooses."""
    registry.load_all()
    op = Op(
        "toy",
        Impl("cpu", lambda x: x.exp(), device="cpu"),
        Impl("torch", slow),
        Impl("reference", lambda x: x.exp(), dtypes=ALL_FLOATS),
    )
    yield op
    del OPS["toy"]


def measured(op: Op, run, x: torch.Tensor = X):
    object.__setattr__(op.impls[0], "run", run)
    return measure(Call(op, (x,)), op.impls[0], QUICK)


def test_a_right_and_fast_row(toy):
    record = measured(toy, lambda x: x.exp())
    assert record.correct and record.failure is None and record.candidate == "torch" and record.refusal() is None
    assert record.speedup > 2 and record.microseconds < 1000 and record.error <= record.plain_error + 1e-9
    assert (record.gpu, record.architecture, record.shape_class) == ("cpu", "cpu", "float32[1024]")
    assert record.versions["torch"] and record.date.endswith("Z")


def test_a_right_and_slow_row(toy):
    object.__setattr__(toy.impls[1], "run", lambda x: x.exp())
    record = measured(toy, slow)
    assert record.correct and record.speedup < 0.5 and "measured slower" in str(record.refusal())


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x.exp() * 1.001, lambda x: torch.cat([x[:-1].exp(), x[-1:]]), lambda x: torch.zeros_like(x)],
    ids=["scale", "tail", "zeros"],
)
def test_a_wrong_row(toy, wrong):
    record = measured(toy, wrong)
    assert not record.correct and record.speedup is None and "measured wrong" in str(record.refusal())


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda x: x.exp()[:-1], "another shape"),
        (lambda x: x.log(), "not finite"),
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_row_that_fails(toy, run, says):
    record = measured(toy, run)
    assert not record.correct and says in str(record.failure) and "failed on cpu" in str(record.refusal())


def test_infinities_that_the_truth_has_are_right(toy):
    values = X.clone()
    values[0], values[1] = float("inf"), float("nan")
    assert measured(toy, lambda x: x.exp(), values).correct
    record = measured(toy, lambda x: x.exp().nan_to_num(), values)
    assert "not finite" in str(record.failure)


def test_whole_numbers_may_differ_in_one_of_a_hundred(toy):
    for impl in toy.impls:
        object.__setattr__(impl, "run", lambda x: (x * 10).round().to(torch.int32))
    for bad, right in ((15, True), (40, False)):
        record = measured(toy, lambda x, bad=bad: (x * 10).round().to(torch.int32).index_fill(0, torch.arange(bad), 9))
        assert record.correct == right and record.error == pytest.approx(bad / 2000)


def test_the_fault_of_another_row_is_not_recorded_as_this_ones(toy):
    object.__setattr__(toy.impls[1], "run", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(toy, lambda x: x.exp())


def test_what_is_changed_in_place_is_compared():
    room, new = torch.zeros(4, 8, 2, 32), torch.randn(3, 2, 32)
    slots, positions = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([2, 0, 5], dtype=torch.int32)
    (call,) = gather(lambda: kv_append(room, room.clone(), new, new, slots, positions))
    op = call.op
    row = Impl("cpu", lambda *args: None, device="cpu")  # writes nothing
    op.impls = (row, *op.impls)
    try:
        record = measure(call, row, QUICK)
    finally:
        op.impls = op.impls[1:]
    assert not record.correct and record.error == pytest.approx(1.0)


def test_a_row_gets_the_strides_of_the_call(toy):
    """Views of a packed projection stay such: a kernel that takes them for contiguous would be right on copies."""
    packed = torch.randn(5, 3, 8)
    record = measured(toy, lambda x: x.as_strided(x.shape, (8, 1)).exp(), packed[:, 1])
    assert not record.correct
    assert measured(toy, lambda x: x.exp(), packed[:, 1]).correct
    assert measured(toy, lambda x: x.exp(), packed[:1, 1].expand(4, 8)).correct


def test_a_call_is_gathered_with_its_gradient():
    x, w = torch.randn(3, 5, 16).requires_grad_(), torch.ones(16).requires_grad_()
    found = gather(lambda: layer_norm(x, w, w))
    assert {(c.op.name, c.wanted) for c in found} == {
        ("layer_norm", ()),
        ("layer_norm", (0, 1, 2)),
        ("layer_norm_backward", ()),
    }
    alone, both = (next(c for c in found if c.op.name == "layer_norm" and bool(c.wanted) == want) for want in (0, 1))
    assert both.shape_class == f"{alone.shape_class} with gradient"
    torch_row = next(i for i in alone.op.impls if i.name == "torch")
    for call in found:
        record = measure(call, next(i for i in call.op.impls if i.name == "torch"), QUICK)
        assert record.correct and record.candidate == "reference" and record.failure is None
    assert blank(both, torch_row).shape_class.endswith("with gradient")
    with torch.no_grad():
        assert {c.op.name for c in gather(lambda: layer_norm(x, w, w))} == {"layer_norm"}


def test_which_rows_are_measured(toy):
    assert ours(toy, torch.device("cpu")) == [toy.impls[0]] and ours(toy, torch.device("cuda")) == []
    rows = ours(OPS["ema"], torch.device("cuda"))
    assert [impl.name for impl in rows] == ["triton"]


def test_nests_of_tensors():
    nest = (X, [X, {"a": X}], None, 3)
    assert len(list(tensors(nest))) == 3
    assert torch.equal(mapped((X, [X], 3), lambda t: t * 2)[1][0], X * 2)
