"""The contrastive loss against its formula in float64, by the error rule; what is drawn as a hard negative."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.contrastive import contrastive_loss, hard_negatives, op, torch_impl
from miss.kernels.dropout import as_seed, uniform
from tests.helpers import check_error_rule, route

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUTES = ["torch", "reference", "custom"]
# rows, columns of the batch, of the queue, width, first
SIZES = [(7, 7, 61, 24, 0), (1, 1, 5, 8, 0), (5, 17, 197, 16, 11), (3, 4, 0, 8, 1), (0, 3, 4, 8, 0), (1, 1, 0, 8, 0)]


def features(rows: int, columns: int, queue: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [F.normalize(torch.randn(n, width), dim=1) for n in (rows, rows, columns, queue)]


def ids(columns: int, queue: int) -> tuple[Tensor, Tensor]:
    return torch.arange(columns) % 5, torch.arange(queue) % 7


def plain(student, teacher, batch, queue, temperature, alpha, batch_ids=None, queue_ids=None, first=0):
    """The formula as the source writes it: cat, softmax, log_softmax, autograd."""
    columns = torch.cat([batch, queue]).detach()
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    s = (student @ columns.T).to(acc) / temperature
    taught = (teacher.detach() @ columns.T).to(acc) / temperature.detach()
    own = torch.arange(first, first + len(student))
    if batch_ids is not None:
        equal = batch_ids[own][:, None] == torch.cat([batch_ids, queue_ids])[None]
        equal[torch.arange(len(own)), own] = False
        s, taught = (t.masked_fill(equal, -1e30) for t in (s, taught))
    targets = alpha * taught.softmax(1) + (1 - alpha) * F.one_hot(own, len(columns)).to(acc)
    return -(targets.detach() * s.log_softmax(1)).sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_rule(size, alpha, with_ids, name, dtype):
    *sizes, first = size
    student, teacher, batch, queue = (t.to(dtype) for t in features(*sizes))
    rest = (*(ids(*sizes[1:3]) if with_ids else (None, None)), first)

    def run(function):
        def call(student, temperature):
            kept = [t.to(student.dtype) for t in (teacher, batch, queue)]
            return function(student, *kept, temperature.to(torch.promote_types(dtype, torch.float32)), alpha, *rest)

        return call

    with route(name, op.FORWARD):
        check_error_rule(
            run(contrastive_loss),
            run(plain),
            [student, torch.tensor(0.07)],
            dtype,
            floor=1e-11 if dtype == torch.float64 else 2e-6,
        )


def test_blocks_change_nothing(monkeypatch):
    student, teacher, batch, queue = features(11, 11, 40, 8)
    temperature = torch.tensor(0.07, requires_grad=True)
    leaf = student.requires_grad_()

    def run():
        loss = contrastive_loss(leaf, teacher, batch, queue, temperature, 0.4, *ids(11, 40))
        return [loss, *torch.autograd.grad(loss.sum(), [leaf, temperature])]

    with route("torch", op.FORWARD):
        whole = run()
        monkeypatch.setitem(torch_impl.BLOCK, "cpu", 3 * 51)
        for got, wanted in zip(run(), whole, strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_twin_of_the_own_caption_does_not_matter_with_ids():
    """A column of equal id may hold anything, without ids it may not: the mask is what makes the difference."""
    student, teacher, batch, queue = features(4, 4, 9, 8)
    batch_ids, queue_ids = torch.arange(4), torch.arange(10, 19)
    queue_ids[3] = 2
    other = queue.clone()
    other[3] = student[2] * 5

    def loss(queue, *given):
        return contrastive_loss(student, teacher, batch, queue, torch.tensor(0.07), 0.4, *given)

    assert torch.equal(loss(queue, batch_ids, queue_ids)[2], loss(other, batch_ids, queue_ids)[2])
    assert not torch.allclose(loss(queue)[2], loss(other)[2])


def test_gradients_go_to_the_student_and_the_temperature_alone():
    inputs = [t.requires_grad_() for t in features(4, 4, 9, 8)]
    temperature = torch.tensor([0.07], requires_grad=True)
    contrastive_loss(*inputs, temperature, 0.4).sum().backward()
    assert inputs[0].grad is not None and temperature.grad is not None and temperature.grad.shape == (1,)
    assert all(t.grad is None for t in inputs[1:])


def test_takes_the_queues_dtype():
    student, teacher, batch, queue = features(4, 4, 9, 8)
    student.requires_grad_()
    loss = contrastive_loss(student, teacher, batch, queue.bfloat16(), torch.tensor(0.07), 0.4)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss.sum(), student)[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_draws_are_no_pair_no_twin_and_the_seeds(name):
    rows, _, batch, _ = features(6, 20, 0, 8)
    batch_ids, first = torch.arange(20) % 9, 3
    temperature = torch.tensor(0.07)
    with route(name, op.NEGATIVES):
        drawn = torch.stack([hard_negatives(rows, batch, temperature, s, batch_ids, first) for s in range(200)])
        again = hard_negatives(rows, batch, temperature, torch.tensor(7), batch_ids, first)
    own = torch.arange(first, first + 6)
    assert torch.equal(again, drawn[7]) and drawn.dtype == torch.int64
    assert ((drawn >= 0) & (drawn < 20)).all() and (batch_ids[drawn] != batch_ids[own]).all()
    assert len(drawn.unique(dim=0)) > 50


def test_draws_follow_the_weights():
    """Frequencies over 4,000 seeds within five standard errors of softmax + 1e-4 without the own column."""
    rows, _, batch, _ = features(2, 6, 0, 8)
    temperature, draws = torch.tensor(0.5), 4000
    drawn = torch.stack([hard_negatives(rows, batch, temperature, 1000 + s) for s in range(draws)])
    weights = (rows @ batch.T / temperature).softmax(1) + 1e-4
    weights[[0, 1], [0, 1]] = 0
    wanted = weights / weights.sum(1, keepdim=True)
    for row in range(2):
        share = torch.bincount(drawn[:, row], minlength=6) / draws
        assert ((share - wanted[row]).abs() <= 5 * (wanted[row] / draws).sqrt() + 1e-9).all()


def test_nothing_to_draw_is_minus_one():
    rows, _, batch, _ = features(3, 3, 0, 8)
    temperature = torch.tensor(0.07)
    assert hard_negatives(rows[:1], batch[:1], temperature, 1).tolist() == [-1]
    assert hard_negatives(rows, batch, temperature, 1, torch.tensor([4, 4, 4])).tolist() == [-1] * 3
    assert hard_negatives(rows[:0], batch, temperature, 1).shape == (0,)


def test_uniform_is_inside_and_even():
    seed = as_seed(3, 0.5)
    u = uniform(seed, (1 << 16,), torch.device("cpu"))
    assert 0 < u.min() and u.max() < 1 and abs(u.mean().item() - 0.5) < 5 * (1 / 12 / (1 << 16)) ** 0.5
    assert torch.equal(uniform(seed, (4, 8), torch.device("cpu")).flatten(), u[:32])


def test_bad_arguments():
    student, teacher, batch, queue = features(4, 4, 9, 8)
    t = torch.tensor(0.07)
    for bad in (
        (student[:, 1:], teacher, batch, queue, t),
        (student, teacher[1:], batch, queue, t),
        (student, teacher, batch, queue, torch.ones(2)),
        (student, teacher, batch, queue, t, 0.4, torch.arange(4)),
        (student, teacher, batch, queue, t, 0.4, torch.arange(4), torch.arange(8)),
        (student, teacher, batch, queue, t, 1.5),
    ):
        with pytest.raises(ValueError, match="wanted"):
            contrastive_loss(*bad)
    with pytest.raises(ValueError, match="no column of their own"):
        contrastive_loss(student, teacher, batch, queue, t, first=1)


def test_opcheck_and_compile():
    student, teacher, batch, queue = features(4, 4, 9, 8)
    temperature = torch.tensor(0.07, requires_grad=True)
    student.requires_grad_()
    args = (student, teacher, batch, queue, temperature, 0.4, *ids(4, 9), 0)
    torch.library.opcheck(op._forward, args)
    torch.library.opcheck(op._negatives, (student.detach(), batch, temperature.detach(), torch.tensor(3), None, 0))

    def function(x):
        return contrastive_loss(x, teacher, batch, queue, temperature, 0.4).sum()

    got, wanted = torch.compile(function, fullgraph=True, backend="aot_eager")(student), function(student)
    torch.testing.assert_close(got, wanted)
    leaves = [student, temperature]
    for g, e in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(g, e)
