"""Modules are entered in one order whatever the lengths: an engine that gathers weights on all ranks relies on it."""

import dataclasses

import pytest
import torch

from tests.models.test_pretrain import batch_of, pretrain_config, pretrain_model


def entered(lengths):
    """The names of the modules that a step enters, in order."""
    model = pretrain_model(pretrain_config())
    names: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: names.append(name))
    batch = batch_of(1)
    batch = dataclasses.replace(batch, lengths=torch.tensor(lengths, dtype=torch.int32))
    model(batch, seed=3)
    return names


@pytest.mark.parametrize("lengths", [[7, 7, 7, 7], [4, 4, 4, 4], [7, 2, 3, 7]])
def test_one_order_for_all_lengths(lengths):
    assert entered(lengths) == entered([7, 4, 2, 5])


def arriving(lengths, pairs, dtype):
    """The names of the parameters in the order in which their gradients arrive."""
    model = pretrain_model(pretrain_config()).to(dtype)
    names: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: names.append(name))
    batch = batch_of(1)
    pixels = (batch.pixels * 30 + 100).clamp(0, 255).to(torch.uint8)
    batch = dataclasses.replace(batch, pixels=pixels, lengths=torch.tensor(lengths, dtype=torch.int32))
    batch = dataclasses.replace(batch, **{name: t[:pairs] for name, t in vars(batch).items()})
    model(batch, seed=3).total.backward()
    return names


@pytest.mark.parametrize(
    ("lengths", "pairs"), [([7, 7, 7, 7], 4), ([7, 4, 2, 5], 2), ([7, 7, 2, 5], 2), ([7, 4, 2, 5], 0)]
)
def test_gradients_arrive_in_one_order(lengths, pairs):
    """Also where few rows choose another implementation of a product than many: buckets of gradients that are added up
    over ranks would hold different parameters."""
    assert arriving(lengths, pairs, torch.float32) == arriving([7, 4, 2, 5], 4, torch.float32)
