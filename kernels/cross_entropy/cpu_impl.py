"""Linear and cross entropy by csrc/cpu/cross_entropy.inl.h and the linears' products.

Knows which rows count, what is kept for a gradient and which products that takes; does not know how they are computed.

Shapes: R rows, M rows that count, C width, V vocabulary. Logits lie the other way round here, (V, M): the weight is
read as it is, and hidden rows are what is packed.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension

_ops = extension.ops()


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
    rows, wanted = hidden[valid], labels[valid]
    _, normaliser, logits = _losses(rows, weight, bias, wanted, label_smoothing, True)
    dhidden, dweight, dbias = _gradients(
        dloss, hidden, weight, rows, logits, wanted, normaliser, valid, label_smoothing, True
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
        losses, lse, logits = _losses(rows, weight, bias, wanted, label_smoothing, keep)
        if keep:
            ctx.label_smoothing = label_smoothing
            ctx.save_for_backward(hidden, weight, bias, rows, wanted, lse, valid, logits)
        out = torch.zeros(len(labels))
        normaliser = out.index_copy(0, valid, lse)
        ctx.mark_non_differentiable(normaliser)
        return out.index_copy_(0, valid, losses), normaliser

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, rows, wanted, lse, valid, logits = ctx.saved_tensors
        dhidden, dweight, dbias = _gradients(
            dloss,
            hidden,
            weight,
            rows,
            logits.clone(),
            wanted,
            lse,
            valid,
            ctx.label_smoothing,
            ctx.needs_input_grad[1],
        )
        return dhidden, dweight, None if bias is None else dbias, None, None, None


def _losses(
    rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, label_smoothing: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse) float32 (M,), logits (V, M) (empty unless `keep`)."""
    panels = _ops.pack_panels(rows)
    bias = None if bias is None else bias.contiguous()
    return _ops.cross_entropy(panels, len(rows), weight.contiguous(), bias, wanted, label_smoothing, keep)


def _gradients(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    logits: Tensor,
    wanted: Tensor,
    lse: Tensor,
    valid: Tensor,
    label_smoothing: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dhidden, dweight, dbias); `logits` becomes their gradient."""
    dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype)
    if not len(valid):
        return dhidden, torch.zeros_like(weight), weight.new_zeros(len(weight))
    dbias = _ops.cross_entropy_gradient(logits, wanted, lse, dloss[valid].float(), label_smoothing)
    dhidden[valid] = logits.t() @ weight
    dweight = None
    if need_weight:
        panels = _ops.pack_panels(rows, True)
        dweight = _ops.linear(logits, panels, rows.shape[1], None, False, None, False)[0]
    return dhidden, dweight, dbias.to(weight.dtype)
