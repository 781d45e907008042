"""The contrastive loss by PyTorch's own kernels: products in the features' dtype, softmaxes of a block of rows at once.

Knows how large a block may be; does not know other implementations. The forward pass makes no copy of the queue.

Shapes: B rows, N columns of the batch, Q columns of the queue, C width. Row i's own column is first + i.
"""

import torch
from torch import Tensor

from miss.kernels.contrastive import reference
from miss.kernels.contrastive.reference import ids_of_columns, log_softmax, masked, own_columns
from miss.kernels.registry import accumulator

BLOCK = {"cpu": 2**21, "cuda": 2**27}  # similarities that are held at once
hard_negatives = reference.hard_negatives  # of a batch alone: nothing that a faster form would save


def _products(rows: Tensor, batch: Tensor, queue: Tensor, temperature: Tensor) -> Tensor:
    """(B, N + Q) similarities in the accumulator's dtype."""
    acc = accumulator(rows.dtype)
    s = torch.empty(len(rows), len(batch) + len(queue), dtype=acc, device=rows.device)
    s[:, : len(batch)] = rows @ batch.T
    s[:, len(batch) :] = rows @ queue.T
    return s.div_(temperature.to(acc))


def _blocks(student: Tensor, columns: int, first: int) -> list[tuple[slice, int]]:
    """Rows to take at once, and the own column of the first of them."""
    size = max(1, BLOCK.get(student.device.type, 2**27) // max(1, columns))
    return [(slice(start, start + size), first + start) for start in range(0, len(student), size)]


def forward(
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
    ids = ids_of_columns(batch_ids, queue_ids)
    out = torch.empty(4, len(student), dtype=accumulator(student.dtype), device=student.device)
    for at, own in _blocks(student, len(batch) + len(queue), first):
        s = _products(student[at], batch, queue, temperature)
        mask = masked(student[at], batch_ids, ids, own)
        wanted = (1 - alpha) * s.gather(1, own_columns(s, own)[:, None])[:, 0]
        logs, lse = log_softmax(s, mask)
        expected = logs.exp_().mul_(s).sum(1)
        taught, teacher_lse = log_softmax(_products(teacher[at], batch, queue, temperature), mask)
        wanted += alpha * taught.exp_().mul_(s).sum(1)
        rows = (lse - wanted, lse, teacher_lse, (wanted - expected) / temperature.to(s.dtype))
        out[:, at] = torch.stack(rows)
    loss, lse, teacher_lse, slope = (row.clone() for row in out)
    return loss, lse, teacher_lse, slope


def backward(
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
    ids, dstudent = ids_of_columns(batch_ids, queue_ids), torch.empty_like(student)
    columns = torch.cat([batch, queue])  # one product: two would each be rounded, and cancel
    for at, own in _blocks(student, len(batch) + len(queue), first):
        ds = _products(student[at], batch, queue, temperature).sub_(lse[at, None]).exp_()
        if alpha:
            ds -= _products(teacher[at], batch, queue, temperature).sub_(teacher_lse[at, None]).exp_().mul_(alpha)
        if (mask := masked(student[at], batch_ids, ids, own)) is not None:
            ds.masked_fill_(mask, 0)
        ds.scatter_add_(1, own_columns(ds, own)[:, None], ds.new_full((len(ds), 1), alpha - 1))
        ds = ds.mul_((dloss[at] / temperature.to(ds.dtype))[:, None]).to(student.dtype)
        dstudent[at] = ds @ columns
    return dstudent, (dloss * slope).sum().to(temperature.dtype)
