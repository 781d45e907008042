"""Leaving padding out changes nothing: states, losses and gradients equal those of the padded batch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.models import decoder, joint
from miss.models.packing import Packing
from miss.models.vqa import MissVQA
from tests.models.test_parity import inputs, small_config


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 3))
def test_packing_and_back(lengths, more):
    padded = max(lengths) + more
    packing = Packing.of(torch.tensor(lengths, dtype=torch.int32), padded)
    if min(lengths) == padded:
        assert packing is None
        return
    assert packing is not None and packing.max_length == max(lengths)
    x = torch.arange(1, len(lengths) * padded + 1).view(len(lengths), padded)
    packed = packing.pack(x)
    assert packed.tolist() == [v for row, n in zip(x.tolist(), lengths, strict=True) for v in row[:n]]
    mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
    assert torch.equal(packing.unpack(packed), x * mask)
    assert packing.offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def test_a_row_of_no_tokens_is_not_packed():
    assert Packing.of(torch.tensor([3, 0], dtype=torch.int32), 3) is None
    assert Packing.of(None, 3) is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_model_is_the_same_without_padding(monkeypatch, dropout):
    """With dropout the masks differ, as they depend on the shape: there both must only be finite and repeatable."""
    config = small_config()
    rates = {"dropout": dropout, "attention_dropout": dropout}
    text = [dataclasses.replace(t, **rates) for t in (config.encoder, config.decoder)]
    torch.manual_seed(0)
    model = MissVQA(dataclasses.replace(config, encoder=text[0], decoder=text[1])).double()
    batch = inputs(config, 40, torch.float64)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = model(batch, label_smoothing=0.1, seed=5 if dropout else None).loss_per_row
        return loss, list(torch.autograd.grad(loss.sum(), list(model.parameters())))

    torch.manual_seed(1)
    loss, grads = run()
    torch.manual_seed(1)
    again, _ = run()
    assert torch.equal(loss, again) and loss.isfinite().all()
    if dropout:
        return
    for module in (joint, decoder):
        monkeypatch.setattr(module.Packing, "of", classmethod(lambda cls, lengths, padded: None))
    padded_loss, padded_grads = run()
    torch.testing.assert_close(loss, padded_loss, rtol=0, atol=1e-12)
    for a, b in zip(grads, padded_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
