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
