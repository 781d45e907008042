"""Rounding with error compensation: what one column's rounding costs, the columns after it make good (GPTQ).

Knows one matrix and the second moments of its inputs; does not know models, files or which layers are packed.

Source: arXiv 2210.17323. Minimises tr((W - Q) H (W - Q)^T) column by column: the error of column j, divided by the
j-th diagonal element of the Cholesky factor of H^-1, is taken out of all later columns along that factor's row.
"""

import torch
from torch import Tensor

from miss.kernels.quant_linear import PackedWeight, pack_codes, pack_int4, pack_int8

DAMPING = 0.01  # of the mean diagonal, added to it: moments from few tokens are not trusted further
DAMPING_INT8 = 0.05  # less is to be gained there: on a text tower's 500 rows, 0.01 and 1.0 were both worse
_BLOCK = 64  # int8 columns whose errors are taken out of the rest of the matrix in one product


def pack_int4_compensated(weight: Tensor, hessian: Tensor, group: int, symmetric: bool = True) -> PackedWeight:
    """`pack_int4` that minimises the error of the layer's outputs instead of the weights'.

    Args:
        weight: float (N, K).
        hessian: float (K, K), the mean of x x^T over the layer's inputs.
        group: columns that share a scale.
    """
    # Transposed, so that the columns that are rounded one after another lie together in memory.
    w = weight.detach().float().T.contiguous()
    factor = inverse_factor(hessian)
    importance = hessian.diagonal().float().clamp_min(0)
    codes = torch.empty_like(w)
    scales, zeros = [], []
    for start in range(0, len(w), group):
        end = min(start + group, len(w))
        block = w[start:end]
        fitted = pack_int4(block.T, group, symmetric, importance=importance[start:end])
        scale = fitted.scale.float()[:, 0]
        zero = torch.full_like(scale, 8) if fitted.zero is None else fitted.zero.float()[:, 0]
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = start + j
            torch.round(block[j] / scale + zero, out=codes[column]).clamp_(0, 15)
            errors[j] = (block[j] - (codes[column] - zero) * scale) / factor[column, column]
            block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    zero_points = None if symmetric else torch.stack(zeros, 1)
    return pack_codes(codes.T, torch.stack(scales, 1), zero_points, group)


def pack_int8_compensated(weight: Tensor, hessian: Tensor, dynamic: bool = False) -> PackedWeight:
    """`pack_int8`, its scales kept, with codes that minimise the error of the layer's outputs; arguments as above."""
    fitted = pack_int8(weight, dynamic)
    w = weight.detach().float().T.contiguous()
    factor = inverse_factor(hessian, DAMPING_INT8)
    codes = torch.empty_like(w)
    for start in range(0, len(w), _BLOCK):
        end = min(start + _BLOCK, len(w))
        block = w[start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = start + j
            torch.round(block[j] / fitted.scale, out=codes[column]).clamp_(-127, 127)
            errors[j] = (block[j] - codes[column] * fitted.scale) / factor[column, column]
            block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return fitted._replace(data=codes.T.to(torch.int8).contiguous())


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor of (H + damping)^-1, with more damping where H is not positive definite enough."""
    h = hessian.double()
    dead = h.diagonal() <= 0
    h = h + torch.diag(dead.double())
    mean = h.diagonal().mean()
    while True:
        lower, info = torch.linalg.cholesky_ex(h + damping * mean * torch.eye(len(h), dtype=h.dtype))
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if info == 0:
            return upper.float()
        assert damping < 1e3, "a matrix with a large positive diagonal added to it is positive definite"
        damping *= 10


def output_error(weight: Tensor, packed: Tensor, hessian: Tensor, outputs: Tensor | None = None) -> float:
    """The mean squared error of the layer's outputs, summed over them (each times `outputs` (N,), where given)."""
    difference = packed.float() - weight.float()
    per_output = ((difference @ hessian.float()) * difference).sum(1)
    return float((per_output if outputs is None else per_output * outputs).sum())
