"""The contrastive loss and the drawing of hard negatives in plain PyTorch: the definition the fast ones must match.

Knows the formulas; does not know speed or memory.

Shapes: B rows, N columns of the batch, Q columns of the queue, C width. Row i's own column is first + i.
"""

import torch
from torch import Tensor

from miss.kernels.dropout import uniform
from miss.kernels.registry import accumulator

FLOOR = 1e-4  # what a draw's weight is at least: a pair that is no negative at all may still come up


def own_columns(rows: Tensor, first: int) -> Tensor:
    """(B,) int64: where in the batch each row's own column is."""
    return torch.arange(first, first + len(rows), device=rows.device)


def masked(rows: Tensor, batch_ids: Tensor | None, column_ids: Tensor | None, first: int) -> Tensor | None:
    """(B, columns) bool, True where a column shares the row's id and is not its own; None where there are no ids."""
    if batch_ids is None or column_ids is None:
        return None
    own = own_columns(rows, first)
    same = batch_ids[own][:, None] == column_ids[None, :]
    return same.scatter_(1, own[:, None], False)


def ids_of_columns(batch_ids: Tensor | None, queue_ids: Tensor | None) -> Tensor | None:
    return None if batch_ids is None or queue_ids is None else torch.cat([batch_ids, queue_ids])


def similarities(rows: Tensor, batch: Tensor, queue: Tensor, temperature: Tensor) -> Tensor:
    """(B, N + Q) in the accumulator's dtype."""
    acc = accumulator(rows.dtype)
    columns = torch.cat([batch, queue]).to(acc)
    return rows.to(acc) @ columns.T / temperature.to(acc)


def log_softmax(s: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(log probabilities, their normaliser (B,)); minus infinity where masked."""
    s = s if mask is None else s.masked_fill(mask, -torch.inf)
    lse = torch.logsumexp(s, 1)
    return s - lse[:, None], lse


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
    s = similarities(student, batch, queue, temperature)
    mask = masked(student, batch_ids, ids_of_columns(batch_ids, queue_ids), first)
    logs, lse = log_softmax(s, mask)
    taught, teacher_lse = log_softmax(similarities(teacher, batch, queue, temperature), mask)
    own = s.gather(1, own_columns(student, first)[:, None])[:, 0]
    wanted = alpha * (taught.exp() * s).sum(1) + (1 - alpha) * own
    slope = (wanted - (logs.exp() * s).sum(1)) / temperature.to(s.dtype)
    return lse - wanted, lse, teacher_lse, slope


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
    mask = masked(student, batch_ids, ids_of_columns(batch_ids, queue_ids), first)
    ds = log_softmax(similarities(student, batch, queue, temperature), mask)[0].exp()
    if alpha:
        ds -= alpha * log_softmax(similarities(teacher, batch, queue, temperature), mask)[0].exp()
    ds.scatter_add_(1, own_columns(student, first)[:, None], ds.new_full((len(ds), 1), alpha - 1))
    ds *= (dloss / temperature.to(ds.dtype))[:, None]
    dstudent = ds @ torch.cat([batch, queue]).to(ds.dtype)
    return dstudent.to(student.dtype), (dloss * slope).sum().to(temperature.dtype)


def hard_negatives(
    rows: Tensor, batch: Tensor, temperature: Tensor, seed: Tensor, batch_ids: Tensor | None, first: int
) -> Tensor:
    s = similarities(rows, batch, batch[:0], temperature)
    weights = torch.softmax(s, 1) + FLOOR
    if (mask := masked(rows, batch_ids, batch_ids, first)) is not None:
        weights.masked_fill_(mask, 0)
    weights.scatter_(1, own_columns(rows, first)[:, None], 0)
    race = weights / -uniform(seed, tuple(weights.shape), weights.device).to(weights.dtype).log()
    if not race.shape[1]:
        return torch.full((len(rows),), -1, device=rows.device)
    best, index = race.max(1)
    return torch.where(best > 0, index, -1)
