"""Layers computed again for the backward pass: the same losses and gradients, bit for bit, dropout included."""

import pytest
import torch

from miss.engine.data.loader import Visit, collate
from miss.models.recompute import Stack, recompute_layers
from tests.engine.tiny import RandomPixels, tiny_model, tiny_rows
from tests.models.test_pretrain import batch_of, pretrain_config, pretrain_model


def gradients(model, loss):
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def pretraining(model):
    return model(batch_of(1), alpha=0.3, seed=5).total


def answering(model):
    rows = tiny_rows(3)
    visits = [Visit(i, 0, tuple(range(len(r)))) for i, r in enumerate(rows)]
    batch = collate(visits, rows, *RandomPixels(3).gather([0, 1, 2], [0, 0, 0])).batch
    torch.manual_seed(3)  # for drop-path, which draws from the generator
    return model(batch, 0.1, 5).loss_per_row.sum()


@pytest.mark.parametrize("which", ["pretraining", "answering"])
def test_gradients_are_the_same_bits(which, monkeypatch):
    if which == "pretraining":
        model, loss_of = pretrain_model(pretrain_config(dropout=0.2)), pretraining
    else:
        model, loss_of = tiny_model(dropout=0.2), answering
        for block in model.vision.blocks:
            block.drop_path = 0.4
    loss = loss_of(model)
    kept = gradients(model, loss)
    recompute_layers(model)
    calls = []
    for layer in [m for stack in model.modules() if isinstance(stack, Stack) for m in getattr(stack, "layers", ())]:
        layer.register_forward_hook(lambda *_: calls.append(1))
    again = loss_of(model)
    forward = len(calls)
    computed = gradients(model, again)
    assert torch.equal(loss, again) and len(calls) == 2 * forward, "every layer ran twice"
    assert not [name for name, gradient in kept.items() if not torch.equal(gradient, computed[name])]
    with torch.no_grad():
        calls.clear()
        assert torch.equal(loss_of(model), loss) and len(calls) == forward
    recompute_layers(model, on=False)
    calls.clear()
    gradients(model, loss_of(model))
    assert len(calls) == forward


def test_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match="Linear has no stack of layers"):
        recompute_layers(torch.nn.Linear(2, 2))
