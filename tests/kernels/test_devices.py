"""The error rule for this folder's dense operations on every device here; `-m gpu` where there is a CUDA device."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.cross_entropy import linear_cross_entropy
from miss.kernels.gelu_mlp import gelu_mlp
from miss.kernels.layer_norm import add_layer_norm, layer_norm
from miss.kernels.patch_embed import patch_embed
from miss.kernels.quant_linear import pack_int4, pack_int8, quant_embedding, quant_linear, unpack
from miss.kernels.registry import OPS
from tests.helpers import DEVICES, check_error_rule, route


class Case(NamedTuple):
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]


def cases(device: str) -> dict[str, Case]:
    """By table, at sizes of the small model."""
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 257, 384), torch.randn(96, 384) * 0.05, torch.randn(96) * 0.1
    gain, labels = torch.rand(384) + 0.5, torch.randint(0, 96, (67,), device=device)
    labels[::3] = -100
    pixels = torch.randint(0, 256, (2, 28, 42, 3), dtype=torch.uint8, device=device)
    scale, shift = torch.tensor([0.017, 0.018, 0.019], device=device), torch.tensor([-2.1, -2.0, -1.8], device=device)
    patch, four = torch.randn(96, 3, 14, 14) * 0.05, pack_int4(w, 64, search=False).to(device)

    def convolved(weight: Tensor, bias: Tensor) -> Tensor:
        acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
        values = (pixels.to(acc) * scale.to(acc) + shift.to(acc)).permute(0, 3, 1, 2).to(weight.dtype)
        return F.conv2d(values, weight, bias, stride=14).flatten(2).transpose(1, 2)

    def entropy(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)

    return {
        "layer_norm": Case(layer_norm, lambda x, w, b: F.layer_norm(x, (384,), w, b), [x, gain, gain]),
        "add_layer_norm": Case(
            lambda x, r, w, b: add_layer_norm(x, r, w, b)[0],
            lambda x, r, w, b: F.layer_norm(x + r, (384,), w, b),
            [x, x.flip(1), gain, gain],
        ),
        "gelu_mlp": Case(gelu_mlp, lambda x, w, b: F.gelu(F.linear(x, w, b)), [x, w, b]),
        "patch_embed": Case(lambda w, b: patch_embed(pixels, w, b, scale, shift), convolved, [patch, b]),
        "linear_cross_entropy": Case(
            lambda h, w, b: linear_cross_entropy(h, w, b, labels, 0.1), entropy, [x[0, :67].clone(), w, b]
        ),
        "quant_linear": Case(
            lambda x, b: quant_linear(x, four, b), lambda x, b: F.linear(x, unpack(four, x.dtype), b), [x, b]
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["torch", "reference", "custom"])
@pytest.mark.parametrize("table", list(cases("cpu")))
@pytest.mark.parametrize("device", DEVICES)
def test_error_rule(device, table, name, dtype):
    case = cases(device)[table]
    with route(name, OPS[table]):
        floor = 1e-11 if dtype == torch.float64 else 1e-5
        check_error_rule(case.ours, case.plain, [t.to(device) for t in case.inputs], dtype, floor=floor)


@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@pytest.mark.parametrize("device", DEVICES)
def test_w8a8_sums_are_the_same_everywhere(device, rows):
    torch.manual_seed(0)
    x, packed = torch.randn(rows, 384), pack_int8(torch.randn(96, 384), dynamic=True)
    results = []
    for name, where in (("reference", "cpu"), ("torch", device), ("reference", device)):
        with route(name, OPS["quant_linear_w8a8"]):
            results.append(quant_linear(x.to(where), packed.to(where)).cpu())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", DEVICES)
def test_tables_and_dropout_are_the_same_everywhere(device):
    table, ids = pack_int4(torch.randn(31, 70), 32, search=False), torch.tensor([[3, 30], [0, 3]])
    assert torch.equal(quant_embedding(ids.to(device), table.to(device)).cpu(), unpack(table)[ids])
    x, gain = torch.randn(5, 384), torch.ones(384)
    summed = [
        add_layer_norm(*(t.to(d) for t in (x, x, gain, gain)), dropout_p=0.3, seed=5)[1].cpu() for d in ("cpu", device)
    ]
    torch.testing.assert_close(summed[0], summed[1])
