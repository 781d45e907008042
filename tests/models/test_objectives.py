"""Pretraining's objectives against the formulas written out, the queue against a list, rows that are not computed."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from miss.benchmarks.peers.literal_pretrain import draw, soft_contrast
from miss.models import objectives as o
from miss.models.config import TextConfig
from miss.models.joint import JointEncoder
from miss.models.layers import mix
from miss.models.queue import NO_CAPTION, Features, Queue
from miss.models.vision import VisionTransformer
from tests.models.test_parity import small_config

PAIRS, PLACES, WIDTH = 5, 7, 6


def features(count: int, ids: list[int] | None = None) -> Features:
    rows = (F.normalize(torch.randn(count, WIDTH, dtype=torch.float64), dim=1) for _ in range(2))
    return Features(*rows, torch.arange(count) if ids is None else torch.tensor(ids))


def students() -> tuple[torch.Tensor, torch.Tensor]:
    image, text, _ = features(PAIRS)
    return image.requires_grad_(), text.requires_grad_()


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.07, 0.0001, 0.9])
def test_contrast_is_the_formula(compat, alpha, temperature):
    image, text = students()
    teacher, queue = features(PAIRS, [3, 1, 3, 0, 1]), features(PLACES, [1, 9, 3, 3, 8, NO_CAPTION, NO_CAPTION])
    raw = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss = o.contrast(image, text, teacher, teacher, 0, queue, o.clamped(raw), alpha, compat)
    same = teacher.ids[:, None] == torch.cat([teacher.ids, queue.ids])
    same[:, :PAIRS] &= ~torch.eye(PAIRS, dtype=torch.bool)
    bounded = raw.detach().clamp(*o.TEMPERATURES).requires_grad_()  # as the original: the parameter itself is clamped
    want = soft_contrast(image, text, *teacher[:2], queue[:2], bounded, alpha, None if compat else same)
    torch.testing.assert_close(loss.mean(), want, rtol=0, atol=1e-10)
    got = torch.autograd.grad(loss.mean(), (image, text, raw))
    for a, b in zip(got, torch.autograd.grad(want, (image, text, bounded)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_parts_of_a_batch_make_the_whole():
    """Two processes with gathered features: their rows' losses are those of one process."""
    image, text = students()
    teacher, queue = features(PAIRS, [0, 1, 1, 2, 0]), features(PLACES)
    t = torch.tensor(0.1, dtype=torch.float64)
    whole = o.contrast(image, text, teacher, teacher, 0, queue, t, 0.3)
    parts = [
        o.contrast(image[a:b], text[a:b], Features(*(x[a:b] for x in teacher)), teacher, a, queue, t, 0.3)
        for a, b in ((0, 3), (3, 5))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compat", [False, True])
def test_negatives_are_drawn_by_the_formula(compat):
    image, text = students()
    teacher, t = features(PAIRS, [0, 1, 1, 2, 0]), torch.tensor(0.5, dtype=torch.float64)
    same = (teacher.ids[:, None] == teacher.ids) if not compat else torch.eye(PAIRS, dtype=torch.bool)
    for seed in range(20):
        pairs = o.matching_pairs(image, text, teacher, t, seed, compat)
        assert pairs.image.tolist() == sorted(pairs.image.tolist()) and pairs.weight.all()
        drawn_image = draw(((text @ teacher.image.T / t).softmax(1) + 1e-4).masked_fill(same, 0), mix(mix(seed, 0), 0))
        drawn_text = draw(((image @ teacher.text.T / t).softmax(1) + 1e-4).masked_fill(same, 0), mix(mix(seed, 1), 0))
        own = range(PAIRS)
        want = [(i, i, 1) for i in own]
        want += [(int(j), i, 0) for i, j in enumerate(drawn_image)] + [(i, int(j), 0) for i, j in enumerate(drawn_text)]
        rows = zip(pairs.image.tolist(), pairs.text.tolist(), pairs.label.tolist(), strict=True)
        assert sorted(rows) == sorted(want)
        if not compat:
            wrong = pairs.label == 0
            assert (teacher.ids[pairs.image[wrong]] != teacher.ids[pairs.text[wrong]]).all()


def test_where_no_negative_is_left_its_row_does_not_count():
    image, text = students()
    t = torch.tensor(0.5, dtype=torch.float64)
    pairs = o.matching_pairs(image, text, features(PAIRS, [4] * PAIRS), t, 0)
    logits = torch.randn(3 * PAIRS, 2, dtype=torch.float64)
    assert int(pairs.weight.sum()) == PAIRS and (pairs.label[pairs.weight == 1] == 1).all()
    loss = o.matching_loss(logits, pairs)
    want = F.cross_entropy(logits[pairs.label == 1], torch.ones(PAIRS, dtype=torch.int64), reduction="sum")
    torch.testing.assert_close(loss.sum(), want)
    one = o.matching_pairs(image[:1], text[:1], Features(*(x[:1] for x in features(PAIRS))), t, 0)
    assert one.weight.tolist() == [1, 0, 0]


def test_next_tokens_and_first_tokens():
    ids, lengths = torch.tensor([[7, 5, 6, 2], [7, 2, 0, 0]]), torch.tensor([4, 2], dtype=torch.int32)
    assert o.next_tokens(ids, lengths).tolist() == [[5, 6, 2], [2, -100, -100]]
    assert o.with_first(ids, 9).tolist() == [[9, 5, 6, 2], [9, 2, 0, 0]] and ids[0, 0] == 7
    states = torch.randn(2, 3, 4)
    rows, labels = o.counted(states, o.next_tokens(ids, lengths))
    assert labels.tolist() == [5, 6, 2, 2] and torch.equal(rows[3], states[1, 0])


def test_masked_words():
    lengths = torch.full((400,), 30, dtype=torch.int32)
    ids = torch.randint(200, 1000, (400, 33))
    ids[:, 30:] = 0
    hidden, labels = o.masked_words(ids, lengths, 103, 1000, 5)
    again, _ = o.masked_words(ids, lengths, 103, 1000, 5)
    chosen = labels != o.IGNORED
    assert torch.equal(hidden, again)
    assert torch.equal(hidden[~chosen], ids[~chosen]) and torch.equal(labels[chosen], ids[chosen])
    assert not chosen[:, 0].any() and not chosen[:, 29:].any()
    assert 0.14 < chosen.sum() / (400 * 28) < 0.16
    shares = [(hidden[chosen] == 103).double().mean(), (hidden[chosen] == ids[chosen]).double().mean()]
    assert abs(shares[0] - 0.8) < 0.03 and abs(shares[1] - 0.1) < 0.03


def test_alpha_ramps_over_two_epochs():
    assert [round(o.alpha_at(step, 10), 3) for step in (0, 5, 10, 20, 500)] == [0, 0.1, 0.2, 0.4, 0.4]
    for step, steps_per_epoch in ((0, 0), (-1, 5)):
        with pytest.raises(ValueError, match="wanted 0 or more"):
            o.alpha_at(step, steps_per_epoch)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=6), st.integers(0, 5))
def test_the_queue_is_a_ring(counts, size):
    """Any last batch, wrap-around, more rows than places: what stays are the last rows, each where its turn was."""
    queue, total = Queue.fresh(size, 2), 0
    places = [NO_CAPTION] * size
    for count in counts:
        ids = torch.arange(total, total + count)
        queue.put(Features(ids[:, None].expand(-1, 2).double(), -ids[:, None].expand(-1, 2).double(), ids))
        for i in range(total, total + count):
            if size:
                places[i % size] = i
        total += count
    assert queue.features.ids.tolist() == places
    assert int(queue.pointer) == (total % size if size else 0)
    for place, i in enumerate(places):
        if i != NO_CAPTION:
            assert queue.features.image[place].tolist() == [i, i] and queue.features.text[place].tolist() == [-i, -i]


def test_the_queue_starts_alike_everywhere_and_again():
    a, b = Queue.fresh(PLACES, WIDTH, 3), Queue.fresh(PLACES, WIDTH, 3)
    assert all(torch.equal(x, y) for x, y in zip(a.features, b.features, strict=True))
    assert torch.allclose(a.features.image.norm(dim=1), torch.ones(PLACES))
    a.put(features(3))
    a.restart()
    fresh = Queue.fresh(PLACES, WIDTH).tensors()
    assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), fresh.values(), strict=True))


@pytest.mark.parametrize("lengths", [None, [7, 4, 1], [7, 7, 7]])
@pytest.mark.parametrize("over_image", [False, True])
def test_first_tokens_alone_are_those_of_all(lengths, over_image):
    config = dataclasses.replace(small_config().encoder, num_layers=2)
    encoder = JointEncoder(config).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(1, config.vocab_size, (3, 7))
    rows = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    source = None
    if over_image:
        source = encoder.cross_kv.layers(torch.randn(2, 5, config.source_width, dtype=torch.float64))
    index = torch.tensor([0, 1, 1], dtype=torch.int32) if over_image else None
    check_first(encoder, encoder(ids, rows, source, index)[:, 0], encoder.first(ids, rows, source, index))


def test_cls_alone_is_that_of_all_tokens():
    config = small_config()
    vision = VisionTransformer(config.vision, config.preprocess).double()
    for parameter in vision.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 40, 40, 3, dtype=torch.float64)
    check_first(vision, vision(pixels)[:, 0], vision.first(pixels))


def check_first(module: torch.nn.Module, want: torch.Tensor, got: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    incoming = torch.randn_like(want)
    parameters = list(module.parameters())
    grads = [torch.autograd.grad(y, parameters, incoming, allow_unused=True, retain_graph=True) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_with_dropout_first_tokens_are_repeatable():
    encoder = JointEncoder(TextConfig(50, 32, 2, 2, 40, 16, source_width=32))
    ids = torch.randint(1, 50, (3, 7))
    a, b, c = (encoder.first(ids, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(0)
    assert a.isfinite().all() and not torch.equal(a, c) and b.shape == (3, 32)
