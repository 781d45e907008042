"""The formula's count of a pretraining step against PyTorch's own counter, which sees every product that is made.

The operations run as their references, recorded product by product: a fused operator hides its products from the
counter. How many words MLM hides is what the step says it did; expected, it is that on average.
"""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from miss.benchmarks import bench_pretrain
from miss.engine.training.flops import pretraining_flops
from miss.kernels import registry
from miss.models.config import MissConfig, PreprocessConfig, TextConfig, TokenConfig, VisionConfig
from miss.models.pretrain import MissPretrain, ObjectiveConfig, PretrainBatch

LENGTHS = [[9] * 6, [9, 5, 7, 4, 8, 6]]


def parts(lengths: list[int], queue: int, mlm: float, among: int = 0) -> tuple[MissPretrain, PretrainBatch]:
    text = TextConfig(300, 64, 3, 2, 160, 20, source_width=96, dropout=0.0, attention_dropout=0.0)
    config = MissConfig(
        VisionConfig(48, 8, 96, 3, 3, 256),
        text,
        dataclasses.replace(text, source_width=64),
        PreprocessConfig(48),
        TokenConfig(0, 1, 2, 3, 4),
        max_question_length=9,
    )
    objective = ObjectiveConfig(feature_width=32, queue_size=queue, mlm=mlm, mask=5, negatives_among=among)
    size, longest = len(lengths), max(lengths)
    ids = torch.randint(10, 300, (size, longest)) * (torch.arange(longest) < torch.tensor(lengths)[:, None])
    batch = PretrainBatch(
        torch.randint(0, 256, (size, 48, 48, 3), dtype=torch.uint8),
        ids,
        torch.tensor(lengths, dtype=torch.int32),
        torch.arange(size),
    )
    return MissPretrain(config, objective), batch


def count(monkeypatch: pytest.MonkeyPatch, model: MissPretrain, batch: PretrainBatch) -> tuple[float, int]:
    """(FLOPs of forward and backward by PyTorch's counter, how many words were hidden)."""
    monkeypatch.setattr(registry.Op, "call", lambda self, custom_op, *args: self.impls[-1].run(*args))
    with FlopCounterMode(display=False) as counter:
        losses = model(batch, alpha=0.4, seed=0)
        losses.total.backward()
    return counter.get_total_flops(), int(losses.numbers.get("hidden", torch.zeros(())))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("queue, mlm, among", [(0, 0.0, 0), (300, 0.0, 2), (300, 0.5, 0)])
def test_formula_and_profiler_agree_within_2_percent(monkeypatch, lengths, queue, mlm, among):
    model, batch = parts(lengths, queue, mlm, among)
    counted, hidden = count(monkeypatch, model, batch)
    assert hidden > 0 or not mlm
    flops = pretraining_flops(model.config, model.objective, batch, hidden=hidden if mlm else None)
    assert flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_what_masked_words_add_is_right_by_itself(monkeypatch, lengths):
    """Held against the step without them, where a wrong term would not drown in the rest."""
    model, batch = parts(lengths, 0, 0.5)
    counted, hidden = count(monkeypatch, model, batch)
    plain = parts(lengths, 0, 0.0)[0]
    before, _ = count(monkeypatch, plain, batch)
    flops = pretraining_flops(model.config, model.objective, batch, hidden=hidden)
    assert flops - pretraining_flops(plain.config, plain.objective, batch) == pytest.approx(counted - before, rel=0.02)
    expected = pretraining_flops(model.config, model.objective, batch)
    words = 0.15 * sum(length - 2 for length in lengths)
    assert expected - flops == pytest.approx(3 * 2 * (words - hidden) * 64 * (64 + 300), rel=1e-6)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_literal_step_is_counted_as_it_is(lengths):
    """Its products by hand: every tower whole and padded, keys and values of an image four times."""
    model, batch = parts(lengths, 300, 0.0)
    counted = bench_pretrain.literal_flops(model, batch)
    c, f, s, v, i, layers = 64, 160, 96, 256, len(lengths), 3
    n, t = 37, max(lengths)
    patches = 2 * i * 36 * 192 * s
    vision = patches + layers * i * (2 * n * (4 * s * s + 2 * s * v) + 4 * n * n * s)
    alone = layers * i * (2 * t * (4 * c * c + 2 * c * f) + 4 * t * t * c)
    over = alone + layers * i * (2 * t * 2 * c * c + 4 * t * n * c + 2 * n * s * 2 * c)
    head = 2 * i * t * c * (c + 300)
    features, contrast = 2 * i * 32 * (s + c), 2 * 2 * i * (i + 300) * 32
    trained = vision + alone + 4 * over + head + features + 2 * 3 * i * c * 2
    twin = vision + alone + features + contrast
    # of the contrast's two products a row the students' have one gradient, the negatives' weights none
    want = 3 * trained - patches + 2 * contrast + twin + 2 * 2 * i * i * 32
    assert counted == pytest.approx(want, rel=0.02)
