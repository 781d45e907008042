"""Linear and cross entropy by PyTorch's own kernels, without float32 logits of more than a block of rows.

Knows which rows count and how large a block may be; does not know other implementations.

Shapes: R rows, M rows that count, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.registry import accumulator

# Elements of the float32 blocks that the softmax is taken over: on CPU a block stays in the second-level cache.
BLOCK = {"cpu": 2**20, "cuda": 2**25}
# Logits that one product may hold, in elements: beyond it the rows are taken in parts.
PART = 2**27


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """(loss, lse), both (R,). For a gradient it keeps the logits of the rows that count, in hidden's dtype."""
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, label_smoothing, ignore_index)


def backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with the logits computed again."""
    valid = (labels != ignore_index).nonzero()[:, 0]
    rows = hidden[valid]
    parts = [F.linear(part, weight, bias) for part in rows.split(_part(weight))]
    dhidden, dweight, dbias = _gradients(
        dloss, hidden, weight, rows, parts, labels[valid], lse[valid], valid, label_smoothing
    )
    assert dweight is not None
    return dhidden, dweight, dbias


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_smoothing: float,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor]:
        valid = (labels != ignore_index).nonzero()[:, 0]
        rows, wanted = hidden[valid], labels[valid]
        keep = any(ctx.needs_input_grad)
        kept, losses, normalisers = [], [], []
        for part, target in zip(rows.split(_part(weight)), wanted.split(_part(weight)), strict=True):
            logits = F.linear(part, weight, bias)
            loss, lse = _losses(logits, target, label_smoothing)
            losses.append(loss)
            normalisers.append(lse)
            kept += [logits] if keep else []
        lse = torch.cat(normalisers)
        if keep:
            ctx.label_smoothing = label_smoothing
            ctx.save_for_backward(hidden, weight, bias, rows, wanted, lse, valid, *kept)
        out = torch.zeros(len(labels), dtype=lse.dtype, device=lse.device)
        normaliser = out.index_copy(0, valid, lse)
        ctx.mark_non_differentiable(normaliser)
        return out.index_copy_(0, valid, torch.cat(losses)), normaliser

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, rows, wanted, lse, valid, *kept = ctx.saved_tensors
        dhidden, dweight, dbias = _gradients(
            dloss, hidden, weight, rows, kept, wanted, lse, valid, ctx.label_smoothing, ctx.needs_input_grad[1]
        )
        return dhidden, dweight, None if bias is None else dbias, None, None, None


def _part(weight: Tensor) -> int:
    return max(1, PART // max(1, len(weight)))


def _block(logits: Tensor) -> int:
    return max(1, BLOCK.get(logits.device.type, 2**25) // max(1, logits.shape[1]))


def _losses(logits: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """(loss, lse) of logits (M, V), in the accumulator's dtype, block by block."""
    acc = accumulator(logits.dtype)
    losses, normalisers = [], []
    for z, y in zip(logits.split(_block(logits)), target.split(_block(logits)), strict=True):
        z = z.to(acc)
        lse = torch.logsumexp(z, -1)
        loss = lse - (1 - label_smoothing) * z.gather(1, y[:, None])[:, 0]
        losses.append(loss - label_smoothing * z.mean(-1) if label_smoothing else loss)
        normalisers.append(lse)
    return torch.cat(losses), torch.cat(normalisers)


def _gradients(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    parts: list[Tensor],
    wanted: Tensor,
    lse: Tensor,
    valid: Tensor,
    label_smoothing: float,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dhidden, dweight, dbias) from the logits of the rows that count, given in parts (of no rows, one)."""
    acc = accumulator(hidden.dtype)
    dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    dweight, dbias = None, torch.zeros(len(weight), dtype=acc, device=weight.device)
    start = 0
    for logits in parts:
        at = slice(start, start + len(logits))
        dz = _dlogits(logits, wanted[at], lse[at], dloss[valid[at]], label_smoothing)
        dhidden[valid[at]] = dz @ weight
        dbias += dz.sum(0)
        if need_weight:
            product = dz.T @ rows[at]
            # One part, the usual case, is its own sum; several are summed in float32.
            dweight = product if dweight is None else dweight.to(acc).add_(product)
        start += len(logits)
    return dhidden, None if dweight is None else dweight.to(weight.dtype), dbias.to(weight.dtype)


def _dlogits(logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor, label_smoothing: float) -> Tensor:
    """dloss * (softmax - (1 - e) * onehot - e / V) in the logits' dtype, computed block by block in float32."""
    acc = accumulator(logits.dtype)
    dz, size = torch.empty_like(logits), _block(logits)
    blocks = (t.split(size) for t in (logits, target, lse, dloss, dz))
    for z, y, normaliser, weight, out in zip(*blocks, strict=True):
        p = torch.sub(z.to(acc), normaliser[:, None]).exp_()
        if label_smoothing:
            p -= label_smoothing / logits.shape[1]
        p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), label_smoothing - 1))
        torch.mul(p, weight[:, None], out=p)
        out.copy_(p)
    return dz
