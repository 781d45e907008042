"""Pretraining on several processes, simulated by threads that gather for real: together they are one process.

Losses and every gradient, averaged over processes, are those of the whole batch on one, whatever the parts' sizes; each
process gathers as often as the others, also one without a pair.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miss.models.config import ConfigError
from miss.models.objectives import IGNORED, groups, masked_words
from miss.models.pretrain import Losses, MissPretrain, ObjectiveConfig, PretrainBatch
from tests.models.test_pretrain import OBJECTIVE, pretrain_config, pretrain_model

EVERYTHING = dataclasses.replace(OBJECTIVE, mlm=0.5, mask=3, negatives_among=2)
LENGTHS, NUMBERS = [7, 4, 2, 5, 9, 3, 8, 6], [2, 0, 3, 1, 4, 4, 0, 5]  # the third group of two has no negative
ALPHA, SEED = 0.3, 1


def batch_of(pairs: int = 8) -> PretrainBatch:
    g = torch.Generator().manual_seed(5)
    lengths = torch.tensor(LENGTHS[:pairs])
    ids = torch.randint(1, 90, (pairs, max(LENGTHS)), generator=g)
    ids[torch.arange(pairs), lengths - 1] = 92
    ids = ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], 0)
    pixels = torch.randn(pairs, 40, 40, 3, generator=g, dtype=torch.float64)
    return PretrainBatch(pixels, ids, lengths.int(), torch.tensor(NUMBERS[:pairs]))


def parts_of(batch: PretrainBatch, sizes: list[int]) -> list[PretrainBatch]:
    """Each cut to its own longest caption, as a loader pads."""
    found, start = [], 0
    for size in sizes:
        rows = slice(start, start := start + size)
        longest = int(batch.lengths[rows].max()) if size else 1
        found.append(
            PretrainBatch(batch.pixels[rows], batch.ids[rows, :longest], batch.lengths[rows], batch.numbers[rows])
        )
    return found


class Processes:
    """`gather` of each of `world` threads; a thread that gathers less often than the others breaks the barrier."""

    def __init__(self, world: int) -> None:
        self.barrier, self.rows = Barrier(world, timeout=20), [torch.empty(0)] * world
        self.calls = [0] * world

    def gather(self, rank: int, rows: Tensor) -> tuple[Tensor, int]:
        assert not rows.requires_grad
        self.rows[rank], self.calls[rank] = rows, self.calls[rank] + 1
        self.barrier.wait()
        everyone, first = torch.cat(self.rows), sum(len(r) for r in self.rows[:rank])
        self.barrier.wait()  # nobody puts the next rows in before all have read these
        return everyone, first

    def run(self, model: MissPretrain, parts: list[PretrainBatch]) -> list[Losses]:
        def one(rank: int) -> Losses:
            return model(parts[rank], lambda rows: self.gather(rank, rows), ALPHA, SEED)

        with ThreadPoolExecutor(len(parts)) as pool:
            return [job.result() for job in [pool.submit(one, rank) for rank in range(len(parts))]]


@pytest.mark.parametrize(
    "sizes, names",
    [
        ([4, 4], ("itc", "itm", "lm", "mlm", "total")),
        ([6, 2], ("itc", "itm", "lm", "mlm", "total")),
        ([8, 0], ("itc", "itm", "lm", "mlm", "total")),
        ([0, 2, 6], ("itc", "itm", "lm", "mlm", "total")),
        ([5, 3], ("itc", "lm", "mlm")),  # a group is cut: its negatives are other ones
    ],
)
def test_the_average_over_processes_is_one_process(sizes, names):
    model, batch = pretrain_model(pretrain_config(), EVERYTHING), batch_of()
    processes = Processes(len(sizes))
    each, whole = processes.run(model, parts_of(batch, sizes)), model(batch, alpha=ALPHA, seed=SEED)
    assert processes.calls == [3] * len(sizes) and whole.mlm is not None and whole.mlm > 0
    parameters = dict(model.named_parameters())
    for name in names:
        mean, want = sum(getattr(x, name) for x in each) / len(each), getattr(whole, name)
        torch.testing.assert_close(mean, want, rtol=0, atol=1e-12)
        grads = [
            torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=name != "total")
            for loss in (mean, want)
        ]
        for parameter, got, wanted in zip(parameters, *grads, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12, msg=lambda m, n=parameter: f"{n}: {m}")
    for losses in each:
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(losses.features, whole.features, strict=True))
    assert sum(int(x.numbers["hidden"]) for x in each) == int(whole.numbers["hidden"])


@pytest.mark.parametrize("behaviour", ["correct", "compat"])
def test_a_process_without_pairs_takes_part(behaviour):
    """Its share is zero with a gradient for every parameter, which is what a sharding engine waits for."""
    model = pretrain_model(pretrain_config(behaviour, dropout=0.1), EVERYTHING)
    full, empty = Processes(2).run(model, parts_of(batch_of(), [8, 0]))
    assert empty.total == 0 and full.total > 0
    grads = torch.autograd.grad(empty.total, list(model.parameters()))
    assert all(not g.any() for g in grads) and all(x.isfinite() for x in empty.numbers.values())
    model.after_update(empty)
    assert int(model.memory.queue.pointer) == 8  # of 10: it holds what the other one saw
    assert torch.equal(model.memory.queue.features.ids[:8], torch.tensor(NUMBERS))


def test_processes_drop_different_places_and_one_seed_repeats_them():
    model = pretrain_model(pretrain_config(dropout=0.3))
    twice = batch_of(4)
    twice = PretrainBatch(*(torch.cat([t, t]) for t in (twice.pixels, twice.ids, twice.lengths, twice.numbers)))
    first, second = ([float(x.lm.detach()) for x in Processes(2).run(model, parts_of(twice, [4, 4]))] for _ in range(2))
    assert first == second and first[0] != first[1]


def test_equal_captions_are_no_negatives_across_processes():
    """A caption on another process that equals the own may be anything: nothing of the own loss sees it."""
    model = pretrain_model(pretrain_config(), EVERYTHING)
    batch = batch_of()
    batch.numbers[:] = torch.tensor([7, 1, 2, 3, 7, 4, 5, 6])
    other = PretrainBatch(batch.pixels.clone(), batch.ids.clone(), batch.lengths, batch.numbers)
    other.pixels[4] += 1
    other.ids[4, 1:3] = 5
    one, two = (Processes(2).run(model, parts_of(b, [4, 4]))[0] for b in (batch, other))
    first, second = (torch.autograd.grad(x.itc, model.temperature, retain_graph=True)[0] for x in (one, two))
    assert not torch.equal(first, second)  # rows 1 to 3 do see it
    alone = [Processes(2).run(model, parts_of(b, [1, 7]))[0] for b in (batch, other)]
    assert torch.equal(alone[0].itc, alone[1].itc)


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 2, 3, 5, 8]))
def test_groups_cut_at_multiples_of_all_rows(count, first, size):
    pieces = groups(count, first, size)
    assert [i for a, b in pieces for i in range(a, b)] == list(range(count))
    whole = {i: (first + i) // size if size else 0 for i in range(count)}
    assert all(len({whole[i] for i in range(a, b)}) <= 1 for a, b in pieces)
    assert len(pieces) == max(1, len(set(whole.values())))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(2, 14), min_size=1, max_size=9), st.data())
def test_hidden_words_for_any_seed(seed, lengths, data):
    """Never the first or last token, a special one or padding; the same for a caption wherever its process is cut."""
    rows, width = len(lengths), max(lengths) + data.draw(st.integers(0, 3))
    ids = torch.randint(200, 1000, (rows, width), generator=torch.Generator().manual_seed(seed % 2**32))
    at = torch.tensor(lengths)
    ids[torch.arange(rows), at - 1] = 102
    ids[:, min(2, width - 1)] = 102  # a special token in the middle, as a caption that quotes one has
    ids = ids.masked_fill(torch.arange(width) >= at[:, None], 0)
    rest = dict(share=0.6, specials=(0, 101, 102), width=32)
    hidden, labels = masked_words(ids, at, 103, 1000, seed, **rest)
    chosen = labels != IGNORED
    real = torch.arange(width) < at[:, None] - 1
    assert not (chosen & ~real).any() and not chosen[:, 0].any() and not (chosen & (ids == 102)).any()
    assert torch.equal(hidden[~chosen], ids[~chosen]) and torch.equal(labels[chosen], ids[chosen])
    assert not hidden[chosen].numel() or int(hidden[chosen].max()) < 1000
    start = data.draw(st.integers(0, rows - 1))
    part, labels_of_part = masked_words(ids[start:], at[start:], 103, 1000, seed, first=start, **rest)
    assert torch.equal(part, hidden[start:]) and torch.equal(labels_of_part, labels[start:])


def test_hidden_words_in_the_shares_of_bert_over_many_seeds():
    ids = torch.randint(200, 1000, (40, 32))
    lengths = torch.full((40,), 32)
    found = [masked_words(ids, lengths, 103, 1000, seed) for seed in range(60)]
    hidden, labels = (torch.stack(list(t)) for t in zip(*found, strict=True))
    chosen, was = labels != IGNORED, ids.expand_as(hidden)
    assert abs(chosen[:, :, 1:-1].double().mean() - 0.15) < 0.005
    share = {
        "mask": (hidden[chosen] == 103).double().mean(),
        "kept": (hidden[chosen] == was[chosen]).double().mean(),
    }
    assert abs(share["mask"] - 0.8) < 0.01 and abs(share["kept"] - 0.1) < 0.01
    other = chosen & (hidden != 103) & (hidden != was)
    assert abs(other.sum() / chosen.sum() - 0.1) < 0.01 and hidden[other].unique().numel() > 500
    assert (chosen.any(0)[:, 1:-1]).all()  # every inner place has its turn


def test_masked_words_are_an_option_that_counts():
    model = pretrain_model(pretrain_config(), dataclasses.replace(OBJECTIVE, mlm=0.5, mask=3))
    losses = model(batch_of(), seed=SEED)
    assert losses.mlm is not None and losses.mlm > 0 and losses.numbers["hidden"] > 0
    torch.testing.assert_close(losses.total, losses.itc + losses.itm + losses.lm + 0.5 * losses.mlm)
    without = pretrain_model(pretrain_config())(batch_of(), seed=SEED)
    assert without.mlm is None and "hidden" not in without.numbers and losses.total > without.total
    with pytest.raises(ConfigError, match=r"mask 103: wanted \[MASK\]'s id, below 97"):
        MissPretrain(pretrain_config(), ObjectiveConfig(24, 10, mlm=1.0))
    with pytest.raises(ConfigError, match="negatives_among 1"):
        ObjectiveConfig(negatives_among=1)


def test_values_that_lack_a_follower_change_nothing():
    model = pretrain_model(pretrain_config())
    losses = model(batch_of(), seed=SEED)
    values = {name: p + 1 for name, p in model.named_parameters() if name != "text_projection.bias"}
    before = {name: t.clone() for name, t in model.memory.tensors().items()}
    with pytest.raises(ValueError, match=r"also follows text_projection\.bias \(1 in all\)"):
        model.after_update(losses, values=values)
    assert all(torch.equal(t, before[name]) for name, t in model.memory.tensors().items())
    with pytest.raises(ValueError, match=r"also follows text_projection\.bias"):
        model.after_update(losses, values=[{name: t} for name, t in values.items() if name in followed(model)])


def test_values_in_parts_are_values_at_once():
    one, other = (pretrain_model(pretrain_config()) for _ in range(2))
    losses = one(batch_of(), seed=SEED)
    values = {name: p.detach() + 1 for name, p in one.named_parameters() if name in followed(one)}
    one.after_update(losses, values=values)
    other.after_update(losses, values=({name: t} for name, t in values.items()))
    for name, t in one.memory.tensors().items():
        assert torch.equal(t, other.memory.tensors()[name])


def followed(model: MissPretrain) -> set[str]:
    return {name for name, _ in model.memory.twin.named_parameters()}
