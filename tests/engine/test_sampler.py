"""Which rows a step has: a pure function of seed and step; every image, or every row, exactly once an epoch."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.data.augment import Limits, View, augment, draw_view, hash64
from miss.engine.data.loader import GroupedLoader, GroupedSampler, Row, collate

counts = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def sampler(num_rows, weights=None, images=3, questions=2, seed=5, whole=False):
    return GroupedSampler(num_rows, weights, images, questions, seed, whole)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 4), st.integers(0, 2**40), st.integers(0, 3))
def test_every_image_exactly_once_an_epoch(num_rows, questions, seed, epoch):
    s = sampler(num_rows, questions=questions, seed=seed)
    n = len(num_rows)
    visits = [s.visit(p) for p in range(epoch * n, (epoch + 1) * n)]
    assert sorted(v.image for v in visits) == list(range(n))
    assert all(v.number == epoch for v in visits)
    for v in visits:
        assert len(set(v.rows)) == len(v.rows) == min(num_rows[v.image], questions or num_rows[v.image])


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 4), st.integers(0, 2**40), st.integers(0, 3))
def test_every_row_exactly_once_an_epoch(num_rows, questions, seed, epoch):
    s = sampler(num_rows, questions=questions, seed=seed, whole=True)
    length = s.epoch_length(epoch)
    visits = [s.visit(p) for p in range(epoch * length, (epoch + 1) * length)]
    asked = Counter((v.image, r) for v in visits for r in v.rows)
    assert asked == Counter((i, r) for i, m in enumerate(num_rows) for r in range(m))


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**40))
def test_a_step_does_not_depend_on_what_was_asked_before(num_rows, images, step, seed):
    walked = sampler(num_rows, images=images, seed=seed)
    history = [walked.step(i) for i in range(step + 1)]
    assert sampler(num_rows, images=images, seed=seed).step(step) == history[step]
    assert walked.step(0) == history[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0]), min_size=1, max_size=8), st.integers(0, 2**40))
def test_weights_are_visits_an_epoch(weights, seed):
    weights = [*weights, 1.0]
    s = sampler([3] * len(weights), weights, seed=seed)
    seen = Counter(s.visit(p).image for p in range(sum(s.epoch_length(e) for e in range(4))))
    assert all(seen[i] == 4 * w for i, w in enumerate(weights))


def test_rows_take_turns_before_one_comes_twice():
    s = sampler([7], questions=3)
    visits = [s.visit(p) for p in range(3)]
    assert set().union(*(v.rows for v in visits)) == set(range(7))
    assert [len(v.rows) for v in visits] == [3, 3, 3]
    assert s.visit(0).rows != s.visit(3).rows or s.visit(1).rows != s.visit(4).rows


def test_seeds_and_epochs_give_different_orders():
    a, b = sampler([1] * 50), sampler([1] * 50, seed=6)
    order = [a.visit(p).image for p in range(100)]
    assert order[:50] != order[50:]
    assert order[:50] != [b.visit(p).image for p in range(50)]
    assert order[:8] == [a.visit(p).image for p in range(8)]


class Numbers:
    """A store whose tokens say which image and visit they belong to."""

    def gather(self, images, visits):
        return None, torch.tensor([[[float(i), float(v)]] for i, v in zip(images, visits, strict=True)])


def make_rows(num_rows):
    return [
        [Row(f"{i}-{r}", [30523, *range(1, r + 2), 102], [30522, 5 + r, 102]) for r in range(m)]
        for i, m in enumerate(num_rows)
    ]


def test_batches_group_rows_by_image():
    num_rows = [3, 1, 5]
    visits = sampler(num_rows).step(0)
    part = collate(
        visits, make_rows(num_rows), *Numbers().gather([v.image for v in visits], [v.number for v in visits])
    )
    index = part.batch.image_index
    assert index.dtype == torch.int32 and (index.diff() >= 0).all()
    for row, qid in enumerate(part.qids):
        image, number = map(int, qid.split("-"))
        assert part.batch.image_tokens[index[row], 0, 0] == image
        length = int(part.batch.question_lengths[row])
        assert part.batch.question_ids[row, :length].tolist() == [30523, *range(1, number + 2), 102]
        assert (part.batch.question_ids[row, length:] == 0).all()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_loader_goes_on_where_it_is_told(prefetch):
    num_rows = [2, 4, 1, 3, 6]
    loader = GroupedLoader(sampler(num_rows), make_rows(num_rows), Numbers(), num_parts=2, prefetch=prefetch)
    stream = loader.steps(4)
    for index in (4, 5, 6):
        step, again = next(stream), loader.build(index)
        assert step.index == index and step.num_rows == sum(len(p.qids) for p in step.parts)
        assert [p.qids for p in step.parts] == [p.qids for p in again.parts]
    stream.close()


def test_a_failure_in_the_loading_thread_is_raised():
    class Broken:
        def gather(self, images, visits):
            raise ValueError("image 3 is gone")

    stream = GroupedLoader(sampler([1, 1]), make_rows([1, 1]), Broken()).steps(0)
    with pytest.raises(ValueError, match="image 3 is gone"):
        next(stream)


def test_augmentation_is_a_function_of_its_key_and_never_flips():
    limits = Limits(10, 0.8, 0.2, 0.2)
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, 48:] = 200  # bright on the right
    image[:10, :40] = 90  # and something at the top left
    for k in range(30):
        view = draw_view(limits, 1, 2, k)
        out = augment(image, view)
        assert out.shape == image.shape and out.dtype == np.uint8
        assert np.array_equal(out, augment(image, draw_view(limits, 1, 2, k)))
        assert out[:, 40:].mean() > out[:, :24].mean()
        assert out[:20, :20].mean() > out[-20:, :20].mean()
        assert -10 <= view.degrees <= 10 and 0.8**0.5 <= view.side <= 1
        assert 0 <= view.left <= 1 - view.side and 0 <= view.top <= 1 - view.side
    assert np.array_equal(augment(image, View()), image)
    assert draw_view(limits, 1, 2, 3) != draw_view(limits, 1, 2, 4)


def test_crop_reads_the_region_it_names():
    smooth = np.repeat(np.linspace(0, 250, 64, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    out = augment(smooth, View(side=0.5, left=0.5, top=0.25))
    assert abs(int(out[32, 0, 0]) - int(smooth[32, 32, 0])) <= 4
    assert abs(int(out[32, 63, 0]) - int(smooth[32, 63, 0])) <= 4


def test_hash_is_fixed_for_ever():
    assert hash64(1, 2, 3) == hash64(1, 2, 3) != hash64(1, 3, 2)
    assert (hash64(17), hash64(1, 2, 3)) == (9260656408219841379, 15020427595393229491)
