"""The formula's count of a pretraining step against PyTorch's own counter, which sees every product that is made.

The operations run as their references, recorded product by product: a fused operator hides its products from the
counter. What the counter does not know (which words MLM hides) stays out.
"""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from miss.engine.training.flops import pretraining_flops
from miss.kernels import registry
from miss.models.config import MissConfig, PreprocessConfig, TextConfig, TokenConfig, VisionConfig
from miss.models.pretrain import MissPretrain, ObjectiveConfig, PretrainBatch


@pytest.mark.parametrize("lengths", [[9] * 6, [9, 5, 7, 4, 8, 6]])
@pytest.mark.parametrize("queue", [0, 300])
def test_formula_and_profiler_agree_within_2_percent(monkeypatch, lengths, queue):
    text = TextConfig(300, 64, 3, 2, 160, 20, source_width=96, dropout=0.0, attention_dropout=0.0)
    config = MissConfig(
        VisionConfig(48, 8, 96, 3, 3, 256),
        text,
        dataclasses.replace(text, source_width=64),
        PreprocessConfig(48),
        TokenConfig(0, 1, 2, 3, 4),
        max_question_length=9,
    )
    objective = ObjectiveConfig(feature_width=32, queue_size=queue)
    model = MissPretrain(config, objective)
    size, longest = len(lengths), max(lengths)
    ids = torch.randint(1, 300, (size, longest)) * (torch.arange(longest) < torch.tensor(lengths)[:, None])
    batch = PretrainBatch(
        torch.randint(0, 256, (size, 48, 48, 3), dtype=torch.uint8),
        ids,
        torch.tensor(lengths, dtype=torch.int32),
        torch.arange(size),
    )
    monkeypatch.setattr(registry.Op, "call", lambda self, custom_op, *args: self.impls[-1].run(*args))
    with FlopCounterMode(display=False) as counter:
        model(batch, alpha=0.4, seed=0).total.backward()
    counted = counter.get_total_flops()
    assert pretraining_flops(config, objective, batch) == pytest.approx(counted, rel=0.02)
