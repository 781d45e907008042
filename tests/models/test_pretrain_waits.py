"""A step on a device waits in one operation alone: from forward to `after_update` the host reads no value, but
`linear_cross_entropy` counts the rows that have a label before its product (once forward, once backward), and has a
stand-in here.

Run on PyTorch's device without data: whatever would read a value, and so wait for a real device, raises. The operations
are their references; what other implementations do inside is not seen, and nothing here ran on a GPU.
"""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from miss.kernels import registry
from miss.models import pretrain
from miss.models.pretrain import MissPretrain, PretrainBatch
from tests.models.test_pretrain import OBJECTIVE, pretrain_config


def every_row(
    states: torch.Tensor, table: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, smoothing: float, ignored: int
) -> torch.Tensor:
    logits = F.linear(states, table, bias)
    return F.cross_entropy(logits, labels, ignore_index=ignored, label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize("behaviour, among", [("correct", 2), ("compat", 0)])
def test_nothing_is_read_by_the_host(monkeypatch, behaviour, among):
    monkeypatch.setattr(registry.Op, "call", lambda self, custom_op, *args: self.impls[-1].run(*args))
    monkeypatch.setattr(pretrain, "linear_cross_entropy", every_row)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no such device
    objective = dataclasses.replace(OBJECTIVE, mlm=0.5, mask=3, negatives_among=among)
    model = MissPretrain(pretrain_config(behaviour, dropout=0.1), objective)
    model.to("meta")
    pixels = torch.empty(5, 40, 40, 3, dtype=torch.uint8, device="meta")
    ids, numbers = (torch.empty(*size, dtype=torch.int64, device="meta") for size in ((5, 9), (5,)))
    losses = model(PretrainBatch(pixels, ids, numbers.int(), numbers), alpha=0.3, seed=1)
    losses.total.backward()
    model.after_update(losses)
    assert losses.total.is_meta and all(p.grad is not None for p in model.parameters())
    for waits in (lambda: float(losses.total.detach()), lambda: ids[ids > 3], lambda: ids.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits()
