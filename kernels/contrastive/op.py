"""Image-text contrast of student rows with the momentum batch and a queue; hard negatives drawn within the batch.

Knows its formula, its gradient and who computes it; does not know queues' pointers, gathering or which modality asks.

    contrastive_loss: K = [batch; queue];  s = student @ K.T / temperature;  s' = teacher @ K.T / temperature
                      y = alpha * softmax(s') + (1 - alpha) * onehot(own)
                      loss = -sum(y * log_softmax(s)) = lse(s) - alpha * sum(softmax(s') * s) - (1 - alpha) * s[own]
    hard_negatives:   w = softmax(rows @ batch.T / temperature) + 1e-4, 0 at own and at equal ids;  index ~ w

student, teacher (B, C); batch (N, C), queue (Q, C), one dtype; temperature one float32 (float64 in float64); row i's
own column is first + i of the batch (first > 0: the batch is gathered from several processes). loss float32 (B,),
float64 in float64. With batch_ids int64 (N,) and queue_ids (Q,), a column other than the own that has the row's id is
taken out of both softmaxes: equal captions are no negatives, and in this project's TransCap data they are many.
The draw is Gumbel-max with counters: the largest w / -log(u) wins, u = `dropout.uniform(seed)` at the element's
row-major index, so a seed decides it on every device and nothing waits for the host. -1 where nothing may be drawn.

Gradient, y held constant as in the source: ds = dloss * (softmax(s) - y);  dstudent = ds @ K / temperature;
dtemperature = -sum(ds * s) / temperature. The latter needs sums over a row that a forward pass has at hand: it is
kept as `slope` (B,), so that a backward pass makes dstudent alone. teacher, batch and queue get none.

Source: arXiv 2107.07651 (ALBEF), 2201.12086 (BLIP).
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels.contrastive import reference, torch_impl
from miss.kernels.dropout import Seed, as_seed
from miss.kernels.registry import ALL_FLOATS, FLOATS, Impl, Op, accumulator, triton

WIDEST = 256  # columns of a feature that a program of the Triton row holds on chip


def _limits(student: Tensor, teacher: Tensor, batch: Tensor, queue: Tensor, *_: object) -> str | None:
    if not student.dtype == teacher.dtype == batch.dtype == queue.dtype:
        return "takes features of one dtype"
    return None if 0 < student.shape[1] <= WIDEST else f"takes 1 to {WIDEST} columns"


def _backward_limits(dloss: Tensor, student: Tensor, *rest: Any) -> str | None:
    return _limits(student, *rest) if student.dtype in FLOATS else "takes float32, float16 and bfloat16"


def _negatives_limits(rows: Tensor, batch: Tensor, *_: object) -> str | None:
    return _limits(rows, rows, batch, batch)


FORWARD = Op(
    "contrastive",
    triton("contrastive.triton_impl", "forward", _limits),
    Impl("torch", torch_impl.forward, dtypes=ALL_FLOATS),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)
BACKWARD = Op(
    "contrastive_backward",
    triton("contrastive.triton_impl", "backward", _backward_limits),
    Impl("torch", torch_impl.backward, dtypes=ALL_FLOATS),
    Impl("reference", reference.backward, dtypes=ALL_FLOATS),
)
NEGATIVES = Op(
    "hard_negatives",
    triton("contrastive.triton_impl", "hard_negatives", _negatives_limits),
    Impl("torch", torch_impl.hard_negatives, dtypes=ALL_FLOATS),
    Impl("reference", reference.hard_negatives, dtypes=ALL_FLOATS),
)


@torch.library.custom_op("miss::contrastive", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor,
    batch: Tensor,
    queue: Tensor,
    temperature: Tensor,
    alpha: float,
    batch_ids: Tensor | None,
    queue_ids: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return FORWARD(student, teacher, batch, queue, temperature, alpha, batch_ids, queue_ids, first)


@_forward.register_fake
def _(student: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = student.new_empty(student.shape[0], dtype=accumulator(student.dtype))
    return loss, torch.empty_like(loss), torch.empty_like(loss), torch.empty_like(loss)


@torch.library.custom_op("miss::contrastive_backward", mutates_args=())
def _backward(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    batch: Tensor,
    queue: Tensor,
    temperature: Tensor,
    alpha: float,
    batch_ids: Tensor | None,
    queue_ids: Tensor | None,
    first: int,
    lse: Tensor,
    teacher_lse: Tensor,
    slope: Tensor,
) -> tuple[Tensor, Tensor]:
    return BACKWARD(
        dloss, student, teacher, batch, queue, temperature, alpha, batch_ids, queue_ids, first, lse, teacher_lse, slope
    )


@_backward.register_fake
def _(dloss: Tensor, student: Tensor, teacher: Tensor, batch: Tensor, queue: Tensor, temperature: Tensor, *_: Any):
    return torch.empty_like(student), torch.empty_like(temperature)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.alpha, batch_ids, queue_ids, ctx.first = inputs
    ctx.save_for_backward(*tensors, batch_ids, queue_ids, *output[1:])


def _grad(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher, batch, queue, temperature, batch_ids, queue_ids, *kept = ctx.saved_tensors
    dstudent, dtemperature = _backward(
        dloss.contiguous(),
        *(student, teacher, batch, queue, temperature, ctx.alpha, batch_ids, queue_ids, ctx.first, *kept),
    )
    return dstudent, None, None, None, dtemperature, None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)


@torch.library.custom_op("miss::hard_negatives", mutates_args=())
def _negatives(
    rows: Tensor, batch: Tensor, temperature: Tensor, seed: Tensor, batch_ids: Tensor | None, first: int
) -> Tensor:
    return NEGATIVES(rows, batch, temperature, seed, batch_ids, first)


@_negatives.register_fake
def _(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


def contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    batch: Tensor,
    queue: Tensor,
    temperature: Tensor,
    alpha: float = 0.0,
    batch_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """The loss of each row, float32 (B,); the mean over rows and directions is the caller's.

    student, teacher and batch are taken in the queue's dtype, under autocast too: products there, sums in float32.

    Raises:
        ValueError: shapes that do not fit each other, ids of one side only, a row without its own column, alpha not
            in [0, 1].
    """
    _check(student, batch, queue, temperature, batch_ids, queue_ids, first)
    if teacher.shape != student.shape:
        raise ValueError(f"contrastive: teacher {tuple(teacher.shape)}; wanted the student's {tuple(student.shape)}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha}; wanted 0 to 1")
    dtype = queue.dtype
    teacher, batch, temperature = teacher.detach().to(dtype), batch.detach().to(dtype), _temperature(temperature, dtype)
    args = (student.to(dtype), teacher, batch, queue.detach(), temperature, float(alpha), batch_ids, queue_ids, first)
    return FORWARD.call(_forward, *args)[0]


def hard_negatives(
    rows: Tensor,
    batch: Tensor,
    temperature: Tensor,
    seed: Seed = None,
    batch_ids: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """For each of rows (B, C) the column of batch (N, C) that is its negative: int64 (B,), -1 where there is none.

    seed: an int, an int64 0-dim tensor, or None for a draw from PyTorch's default generator. No gradient.

    Raises:
        ValueError: shapes that do not fit each other, or a row without its own column.
    """
    _check(rows, batch, batch[:0], temperature, batch_ids, None if batch_ids is None else batch_ids[:0], first)
    drawn = as_seed(seed, 0.5)
    assert drawn is not None
    temperature = _temperature(temperature.detach(), batch.dtype)
    args = (rows.detach().to(batch.dtype), batch.detach(), temperature, drawn, batch_ids, first)
    return NEGATIVES.call(_negatives, *args)


def _temperature(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    return temperature.reshape(()).to(accumulator(dtype))


def _check(
    rows: Tensor,
    batch: Tensor,
    queue: Tensor,
    temperature: Tensor,
    batch_ids: Tensor | None,
    queue_ids: Tensor | None,
    first: int,
) -> None:
    fits = rows.dim() == batch.dim() == queue.dim() == 2 and rows.shape[1] == batch.shape[1] == queue.shape[1]
    if not fits or temperature.numel() != 1:
        raise ValueError(
            f"contrastive: rows {tuple(rows.shape)}, batch {tuple(batch.shape)}, queue {tuple(queue.shape)}, "
            f"temperature {tuple(temperature.shape)}; wanted (B, C), (N, C), (Q, C) and one number"
        )
    if first < 0 or first + len(rows) > len(batch):
        raise ValueError(
            f"contrastive: rows {first} to {first + len(rows)} have no column of their own in a batch of {len(batch)}"
        )
    if (batch_ids is None) != (queue_ids is None):
        raise ValueError("contrastive: got ids of one side; wanted batch_ids and queue_ids, or neither")
    for ids, columns in ((batch_ids, batch), (queue_ids, queue)):
        if ids is not None and (ids.dtype != torch.int64 or ids.shape != columns.shape[:1]):
            raise ValueError(f"contrastive: ids {ids.dtype} {tuple(ids.shape)}; wanted int64 ({len(columns)},)")
