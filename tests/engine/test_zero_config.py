"""A user's ds_config.json against the run: "auto" filled, contradictions named with both values."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miss.engine.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from miss.engine.training.opened import Opened, put_back
from miss.engine.training.zero_config import RunFacts, filled, keeps_whole, read_ds_config
from miss.models.config import ConfigError
from miss.models.vqa import VQAOutput

PRESETS = sorted((Path(__file__).resolve().parents[2] / "configs" / "deepspeed").glob("*.json"))
RUN = RunFacts(OptimizerConfig(clip=0.5), ScheduleConfig(100, 10), None, 48, 2, 4, True, 384)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_are_filled(path):
    given = read_ds_config(path)
    values = filled(given, RUN)
    assert "auto" not in json.dumps(values) and values["zero_optimization"]["stage"] == int(path.stem[4])
    assert values["train_batch_size"] == 48 == values["train_micro_batch_size_per_gpu"] * 2 * 4
    assert values["bf16"]["enabled"] == (values["zero_optimization"]["stage"] > 0)
    assert "auto" in json.dumps(given), "what is given is left as it was"
    with pytest.raises(ConfigError, match=r"zero_optimization.stage is \d there; zero_stage is \d here"):
        filled(given, RunFacts(OptimizerConfig(), stage=(values["zero_optimization"]["stage"] + 1) % 4))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64 there; the step over all ranks is 48 here"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps is 3 there; data.accumulation is 2 here"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 there; optimizer.clip is 0.5 here"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False there; bf16 is True here"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True there"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is 'Lamb' there; optimizer.name is 'adamw' here"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "lr is 0.001 there; optimizer.rate_new"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, "betas is .0.9, 0.95. there"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type is 'WarmupLR' there"),
        ({"zero_optimization": {"sub_group_size": "auto"}}, 'nothing here fills "auto" of zero_optimization.sub_group'),
    ],
)
def test_contradictions_name_both_values(given, words):
    with pytest.raises(ConfigError, match=words):
        filled(given, RUN)


def test_what_agrees_and_what_is_deepspeeds_own_passes():
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"}}
    cosine = {"warmup_num_steps": "auto", "total_num_steps": 100, "cos_min_ratio": 0, "warmup_type": "linear"}
    own = {
        "optimizer": optimizer,
        "scheduler": {"type": "WarmupCosineLR", "params": cosine},
        "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": True,
    }
    values = filled(own, RUN)
    assert values["zero_optimization"]["reduce_bucket_size"] == 1000 and not values["zero_optimization"]["overlap_comm"]
    assert values["wall_clock_breakdown"] and not {"optimizer", "scheduler"} & values.keys()
    assert values["data_types"] == {"grad_accum_dtype": "fp32"} and values["gradient_clipping"] == 0


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_ds_config(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_ds_config(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ConfigError, match="got list"):
        read_ds_config(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="wanted engine: zero"):
        TrainConfig(ds_config="x.json")


def test_which_stages_keep_weights_whole():
    assert [(s, h) for s in range(4) for h in (False, True) if keeps_whole(s, h)] == [
        (0, False),
        (0, True),
        (1, False),
        (2, False),
    ]


VALUES = st.recursive(
    st.one_of(st.integers(), st.none(), st.builds(torch.full, st.just((2,)), st.floats(-9, 9))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(VQAOutput, inner, inner),
    ),
    max_leaves=6,
)


@given(VALUES)
def test_a_model_opened_gives_back_what_it_returned(value):
    class Model(torch.nn.Module):
        def forward(self):
            return value

    opened = Opened(Model())
    tensors = opened()
    assert isinstance(tensors, tuple) and all(isinstance(t, torch.Tensor) for t in tensors)
    assert repr(put_back(opened.shape, tensors)) == repr(value)
