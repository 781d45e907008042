"""Rates, layer groups, the moving average, the configuration: pure parts of a training run."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from miss.engine.training.ema import Ema
from miss.engine.training.flops import training_flops
from miss.engine.training.optimizer import freeze, layer_group, parameter_groups
from miss.engine.training.schedule import rate_share
from miss.models.config import ConfigError
from tests.engine.tiny import RandomPixels, RandomTokens, tiny_model, tiny_rows


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 400), st.integers(0, 399), st.floats(0, 1))
def test_warm_up_rises_cosine_falls(total, warmup, final):
    warmup = min(warmup, total - 1)
    config = ScheduleConfig(total, warmup, final)
    shares = [rate_share(step, config) for step in range(total + 1)]
    assert all(0 <= s <= 1 for s in shares)
    assert shares[:warmup] == sorted(shares[:warmup]) and shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert shares[warmup] == pytest.approx(1) and shares[total] == pytest.approx(final, abs=1e-12)
    assert rate_share(10 * total, config) == pytest.approx(final, abs=1e-12)


def test_half_way_is_half():
    assert rate_share(60, ScheduleConfig(total_steps=110, warmup_steps=10)) == pytest.approx(0.5)


def test_layer_groups_hold_every_trained_parameter_once():
    model = tiny_model()
    frozen = freeze(model, OptimizerConfig(freeze=("*.embeddings.*",)), train_vision=True)
    assert frozen == [n for n, _ in model.named_parameters() if ".embeddings." in n]
    groups = parameter_groups(model, OptimizerConfig(rate_new=3.0, rate_text=2.0, rate_vision=1.0, weight_decay=0.5))
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for group in groups:
        for name in group.parameters:
            assert group.rate == {"new": 3.0, "text": 2.0, "vision": 1.0}[layer_group(name)]
            is_matrix = model.get_parameter(name).ndim > 1 and "position_embedding" not in name and "cls" not in name
            assert group.weight_decay == (0.5 if is_matrix else 0.0), name
    assert layer_group("encoder.cross_kv.weight") == layer_group("decoder.head.transform.weight") == "new"
    assert layer_group("encoder.layers.0.cross_attention.norm.bias") == "new"
    assert layer_group("decoder.layers.1.mlp.input.weight") == "text"


def test_vision_is_frozen_by_default_and_patterns_must_match():
    model = tiny_model()
    assert all(name.startswith("vision.") for name in freeze(model, OptimizerConfig(), train_vision=False))
    with pytest.raises(ConfigError, match="matches no parameter"):
        freeze(model, OptimizerConfig(freeze=("encodr.*",)), train_vision=False)
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze(model, OptimizerConfig(freeze=("*",)), train_vision=True)


def test_average_follows_its_formula_and_changes_places_exactly():
    model = torch.nn.Linear(3, 2)
    ema = Ema(model, decay=0.9)
    expected = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    for step in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        decay = min(0.9, (1 + step) / (10 + step))
        for n, p in model.named_parameters():
            expected[n] = decay * expected[n] + (1 - decay) * p.detach().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with ema.applied():
        for n, p in model.named_parameters():
            assert torch.allclose(p.double(), expected[n], atol=1e-6)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_config_round_trips_and_is_frozen():
    values = {"data": {"train": [{"dataset": "vqa-rad", "weight": 2}]}, "optimizer": {"freeze": ["a.*"]}, "bf16": False}
    config = TrainConfig.from_dict(values)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.data.train[0].weight == 2.0 and config.optimizer.freeze == ("a.*",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimiser": {}}, "did you mean optimizer"),
        ({"optimizer": {"rate_nwe": 1}}, r"optimizer\.rate_nwe \(did you mean rate_new\?\)"),
        ({"data": {"train": [{"datset": "slake"}]}}, r"data\.train\[0\]\.datset \(did you mean dataset\?\)"),
        ({"schedule": {"total_steps": 5, "warmup_steps": 5}}, "wanted less than total_steps"),
        ({"schedule": {"total_steps": "many"}}, "wanted int"),
        ({"train_vision": True, "standardise_features": True}, "standardise_features"),
        ({"train_vision": True, "augment": {"keep_tokens": 0.5}}, "keep_tokens"),
        ({"data": {"accumulation": 50}}, "at most data.images_per_step"),
        ({"data": {"train": []}}, "at least one"),
        ({"data": 3}, "wanted a mapping"),
        ({"engine": "fast"}, "accepted: plain, zero"),
        ({"augment": {"crop_share": 0.0}}, "crop_share"),
        ([], "wanted a mapping"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("train_words", [False, True])
def test_flops_agree_with_pytorchs_own_count(train_vision, train_words):
    from torch.utils.flop_counter import FlopCounterMode

    from miss.engine.data.loader import GroupedLoader, GroupedSampler
    from miss.kernels.registry import OPS, use

    model, rows = tiny_model(vocabulary=96), tiny_rows()
    pattern = () if train_words else ("*.embeddings.word.weight",)
    freeze(model, OptimizerConfig(freeze=pattern), train_vision)
    store = RandomPixels(len(rows)) if train_vision else RandomTokens(len(rows))
    loader = GroupedLoader(GroupedSampler([len(r) for r in rows], None, 6, 4, 1), rows, store)
    part = loader.build(0).parts[0]
    plain = {
        op.name: "torch" for op in OPS.values() if "torch" in op.names
    }  # PyTorch's counter sees its own operations alone
    with FlopCounterMode(display=False) as counter, use(**plain):
        output = model(part.batch, 0.0, None)
        output.loss_per_row.mean().backward()
    counted = counter.get_total_flops()
    ours = training_flops(model.config, part.batch, train_vision, train_words)
    assert math.isclose(ours, counted, rel_tol=0.15), (ours, counted)
