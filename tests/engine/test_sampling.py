"""Sampling: the exact distribution, cut as Hugging Face cuts it, and the same tokens for the same seed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.runtime.sampling import Sampling, draw, keep, uniform
from tests.engine.searching import drive, logprob, random_distribution

SEP, DEC, VOCABULARY = 5, 6, 9
LOGITS = st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=40)


def kept_by_definition(logits, temperature, top_k, top_p):
    """Sorted by probability, then id; the first k; then those before whom less than p has been gathered."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or None]
    total, before, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if kept and before >= top_p * total:
            break
        kept.append(i)
        before += p[i]
    return kept


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 0.99))
def test_what_is_kept(values, temperature, top_k, top_p):
    logits = np.array(values)
    ids, share = keep(logits, temperature, top_k, top_p)
    wanted = kept_by_definition(logits, temperature, top_k, top_p)
    # At the boundary the two sums may differ in their last bits: then one of them keeps one token more.
    assert abs(len(ids) - len(wanted)) <= 1 and set(ids.tolist()) <= set(wanted) | set(ids.tolist()[-1:])
    if len(ids) != len(wanted):
        p = np.exp((logits - logits.max()) / temperature)
        order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or None]
        near = p[order[: min(len(ids), len(wanted))]].sum() / p[order].sum()
        assert near == pytest.approx(top_p, abs=1e-12)
    assert np.allclose(share, np.exp((logits[ids] - logits.max()) / temperature))


def test_the_token_that_crosses_p_is_kept():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    for top_p, count in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4)):
        assert sorted(keep(logits, 1.0, 0, top_p)[0].tolist()) == list(range(count)), top_p


@pytest.mark.parametrize("top_k", [0, 1, 7, 300])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.31, 0.01])
def test_the_cut_is_hugging_faces(top_k, top_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    for seed, size in ((0, 0.05), (1, 1.0), (2, 4.0)):
        logits = torch.from_numpy(np.random.default_rng(seed).standard_normal(5000) * size)
        scores = logits[None] / 0.7
        if top_k:
            scores = process.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = process.TopPLogitsWarper(top_p)(None, scores)
        wanted = torch.isfinite(scores[0]).nonzero()[:, 0].tolist()
        assert sorted(keep(logits.numpy(), 0.7, top_k, top_p)[0].tolist()) == wanted


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 6, 1.0), (1.0, 0, 0.8)]
)
def test_the_draws_follow_the_exact_probabilities(temperature, top_k, top_p):
    """Chi-square over 20,000 seeds; 5 standard deviations above its mean would be one run in millions, and the seeds
    are fixed."""
    logits, count = np.random.default_rng(5).standard_normal(12), 20_000
    kept = kept_by_definition(logits, temperature, top_k, top_p)
    p = np.zeros(12)
    p[kept] = np.exp(logits[kept] / temperature)
    p /= p.sum()
    seen = np.zeros(12)
    for seed in range(count):
        token, logprob = draw(logits, uniform(seed, 0, 3), temperature, top_k, top_p)
        seen[token] += 1
    assert logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()))  # of the whole, at temperature 1
    assert not seen[p == 0].any()
    chi, freedom = ((seen[kept] - count * p[kept]) ** 2 / (count * p[kept])).sum(), len(kept) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_the_uniform_numbers_are_uniform_and_unrelated():
    numbers = np.array(
        [[[uniform(seed, sample, step) for step in range(8)] for sample in range(4)] for seed in range(200)]
    )
    assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    assert np.histogram(numbers, 10, (0, 1))[0].std() < 4 * math.sqrt(numbers.size / 10)
    for axis in range(3):  # neighbours in seed, sample and step
        one, next_one = (np.moveaxis(numbers, axis, 0)[part].ravel() for part in (slice(None, -1), slice(1, None)))
        assert abs(np.corrcoef(one, next_one)[0, 1]) < 4 / math.sqrt(len(one))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 3), st.integers(1, 6), st.floats(0.3, 2))
def test_a_seed_gives_the_same_answer_and_its_true_score(seed, num_alternatives, most, temperature):
    distribution = random_distribution(seed % 1000, VOCABULARY)
    options = (DEC, SEP, most, temperature, 5, 0.9, seed, num_alternatives)
    first, again = Sampling(*options), Sampling(*options)
    steps = drive(first, distribution)
    drive(again, distribution)
    assert first.hypotheses == again.hypotheses and len(first.hypotheses) == 1 + num_alternatives
    assert steps == max(len(h.token_ids) for h in first.hypotheses) <= most
    for h in first.hypotheses:
        assert h.finished == (h.token_ids[-1] == SEP) and (h.finished or len(h.token_ids) == most)
        assert h.logprob == pytest.approx(logprob(distribution, DEC, h.token_ids), abs=1e-5)
    alone = Sampling(*options[:-1], 0)  # the answer does not depend on how many others are drawn
    drive(alone, distribution)
    assert alone.hypotheses[0] == first.hypotheses[0]


def test_alternatives_are_independent_and_a_missing_seed_is_drawn():
    distribution = random_distribution(1, 500, size=0.1)
    search = Sampling(DEC, SEP, 4, num_alternatives=9)
    drive(search, distribution)
    assert len({tuple(h.token_ids) for h in search.hypotheses}) == 10
    assert Sampling(DEC, SEP, 4).seed != Sampling(DEC, SEP, 4).seed


def test_certain_tokens_are_taken_at_any_number():
    logits = np.array([-np.inf, 0.0, -np.inf, -800.0])
    for at in (0.0, 0.5, 1 - 2**-53):
        assert draw(logits, at) == (1, 0.0)
        assert draw(logits, at, temperature=1e-6, top_k=3, top_p=0.5)[0] == 1


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_an_overflow_is_said(logits):
    with pytest.raises(ValueError, match="wider precision"):
        draw(np.array(logits), 0.5)
