"""The figures against slow readings of their definitions, and the intervals' coverage on data whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.evaluation.metrics import (
    COVERAGES,
    ClusterBootstrap,
    RiskCoverage,
    calibration,
    mass_bins,
    mcnemar_exact,
    paired,
    reliability,
    width_bins,
)

ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 1 / 15, 0.5, 0.6, 0.99, 1.0]) | st.floats(0, 1), st.booleans()),
    min_size=1,
    max_size=40,
)


def columns(rows):
    return np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])


# The bootstrap.


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(-2, 2), st.booleans()), min_size=1, max_size=25),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_each_resample_is_the_mean_over_the_images_drawn(rows, seed):
    clusters, values, mask = (list(c) for c in zip(*rows, strict=True))
    bootstrap = ClusterBootstrap(clusters, num_resamples=30, seed=seed)
    order = list(dict.fromkeys(clusters))
    slow = []
    for draw in np.concatenate(list(bootstrap.draws(1))):
        assert draw.sum() == len(order)
        picked = [
            i for c, times in zip(order, draw, strict=True) for _ in range(int(times)) for i in where(clusters, c)
        ]
        chosen = [values[i] for i in picked if mask[i]]
        if chosen:
            slow.append(sum(chosen) / len(chosen))
    figure = bootstrap.mean(values, mask)
    inside = [v for v, m in zip(values, mask, strict=True) if m]
    assert figure.n == len(inside)
    assert figure.value == (pytest.approx(sum(inside) / len(inside)) if inside else None)
    if len({c for c, m in zip(clusters, mask, strict=True) if m}) < 2:
        assert figure.interval is None
    else:
        assert figure.interval == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))))


def where(clusters, wanted):
    return [i for i, c in enumerate(clusters) if c == wanted]


def test_chunks_do_not_change_the_draws(monkeypatch):
    bootstrap = ClusterBootstrap(range(7), num_resamples=101, seed=3)
    whole = np.concatenate(list(bootstrap.draws(1)))
    monkeypatch.setattr("miss.engine.evaluation.metrics._CHUNK_ELEMENTS", 70)
    parts = list(bootstrap.draws(1))
    assert len(parts) == 11
    assert np.array_equal(whole, np.concatenate(parts))


def test_the_same_seed_gives_the_same_interval():
    values, clusters = np.random.default_rng(0).random(40), np.arange(40) // 4
    first, again, other = (ClusterBootstrap(clusters, 500, seed).mean(values).interval for seed in (1, 1, 2))
    assert first == again != other


def test_nothing_to_resample():
    assert ClusterBootstrap([]).mean([]).to_dict() == {"accuracy": None, "ci95": None, "n": 0}
    assert ClusterBootstrap(["a", "a"]).mean([1, 0]).to_dict() == {"accuracy": 0.5, "ci95": None, "n": 2}
    assert ClusterBootstrap(["a", "b"], num_resamples=0).mean([1, 0]).interval is None
    with pytest.raises(ValueError, match="got -1; wanted 0"):
        ClusterBootstrap(["a"], num_resamples=-1)


def test_intervals_cover_the_truth_and_rows_alone_would_not():
    # 60 images of 8 questions that all but share their fate: what counts is the images.
    generator = np.random.default_rng(0)
    hits = {"images": 0, "rows": 0}
    for trial in range(200):
        chance = generator.beta(0.7, 0.3, 60)
        values = (generator.random((60, 8)) < chance[:, None]).ravel()
        for name, clusters in (("images", np.repeat(np.arange(60), 8)), ("rows", np.arange(480))):
            low, high = ClusterBootstrap(clusters, 300, trial).mean(values).interval
            hits[name] += low <= 0.7 <= high
    assert 0.90 <= hits["images"] / 200 <= 0.99
    assert hits["rows"] / 200 < 0.80


# Pairs.


def slow_mcnemar(only_a, only_b):
    """Two-sided: the chance of every split that is no likelier than this one, over Pascal's triangle."""
    row = [1]
    for _ in range(only_a + only_b):
        row = [1, *(x + y for x, y in zip(row, row[1:], strict=False)), 1]
    return sum(c for c in row if c <= row[only_a]) / sum(row)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
@settings(deadline=None)
def test_mcnemar_by_counting(pairs):
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    only_a, only_b, p_value = mcnemar_exact(a, b)
    assert (only_a, only_b) == (pairs.count((True, False)), pairs.count((False, True)))
    assert p_value == pytest.approx(slow_mcnemar(only_a, only_b))


def test_paired_difference_is_paired():
    a, b = np.tile([1, 1, 0, 0], 25), np.tile([1, 0, 0, 0], 25)
    result = paired(ClusterBootstrap(np.arange(100) // 4, 400), a, b)
    assert (result.only_a, result.only_b) == (25, 0)
    # Every image has the same difference, so that pairing leaves it no spread.
    assert result.difference.value == 0.25 and result.difference.interval == (0.25, 0.25)


# Calibration.


def test_width_bins_hold_their_upper_edge():
    assert width_bins(np.array([0.0, 1 / 15, 0.0667, 14 / 15, 0.94, 1.0])).tolist() == [0, 0, 1, 13, 14, 14]


@given(ROWS)
def test_mass_bins_are_even_and_keep_equal_scores_together(rows):
    scores, _ = columns(rows)
    bins = mass_bins(scores)
    assert bins.min() == 0 and bins.max() < 15
    for score in scores:
        assert len(set(bins[scores == score])) == 1
    if len(set(scores)) == len(scores):
        sizes = np.bincount(bins, minlength=15)
        assert sizes.max() - sizes.min() <= 1


@given(ROWS)
@settings(deadline=None)
def test_calibration_by_its_definitions(rows):
    scores, correct = columns(rows)
    found = calibration(ClusterBootstrap(range(len(rows)), 20), scores, correct)
    assert found.brier.value == pytest.approx(np.mean([(s - c) ** 2 for s, c in rows]))
    for figure, bins in ((found.ece_width, width_bins(scores)), (found.ece_mass, mass_bins(scores))):
        slow = 0.0
        for b in set(bins.tolist()):
            inside = bins == b
            slow += inside.mean() * abs(correct[inside].mean() - scores[inside].mean())
        assert figure.value == pytest.approx(slow)
        assert figure.n == len(rows)
    for b in reliability(scores, correct):
        inside = [(s, c) for s, c in rows if b["low"] < s <= b["high"] or (s == 0 == b["low"])]
        # Edges are thirds of fifths: a score within rounding of one may fall either way.
        if all(min(abs(s - e / 15) for e in range(16)) > 1e-9 for s, _ in rows):
            assert b["n"] == len(inside)


@given(ROWS)
def test_risk_coverage_by_its_definition(rows):
    scores, correct = columns(rows)
    selective = RiskCoverage(scores, correct).selective()
    slow = [1 - correct[scores >= s].mean() for s in scores]
    assert selective.area == pytest.approx(np.mean(slow))
    for coverage, accuracy in zip(COVERAGES, selective.accuracy, strict=True):
        enough = [t for t in scores if (scores >= t).mean() >= coverage - 1e-12]
        assert accuracy == pytest.approx(correct[scores >= max(enough)].mean())
    assert selective.coverage[-1] == pytest.approx(1) and selective.risk[-1] == pytest.approx(1 - correct.mean())


@given(ROWS, st.randoms())
def test_the_order_of_rows_does_not_matter(rows, random):
    scores, correct = columns(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    one, other = (RiskCoverage(s, c).selective() for s, c in ((scores, correct), (scores[order], correct[order])))
    assert one.area == pytest.approx(other.area)
    assert one.accuracy == pytest.approx(other.accuracy)


def test_resampled_curves_are_those_of_the_repeated_rows():
    generator = np.random.default_rng(5)
    scores, correct = generator.integers(0, 6, 30) / 5, (generator.random(30) < 0.6).astype(float)
    clusters = np.arange(30) // 3
    bootstrap = ClusterBootstrap(clusters, 40, seed=2)
    curve = RiskCoverage(scores, correct)
    drawn = bootstrap.by_row(curve.statistics, curve.order)
    for draw, found in zip(np.concatenate(list(bootstrap.draws(30))), drawn, strict=True):
        repeated = np.repeat(np.arange(30), draw[clusters].astype(int))
        slow = RiskCoverage(scores[repeated], correct[repeated]).selective()
        assert found == pytest.approx([slow.area, *slow.accuracy])


def test_perfectly_calibrated_scores_have_little_error():
    generator = np.random.default_rng(1)
    scores = generator.random(20_000)
    correct = (generator.random(20_000) < scores).astype(float)
    found = calibration(ClusterBootstrap(np.arange(20_000) // 200, 50), scores, correct)
    assert found.ece_width.value < 0.02 and found.ece_mass.value < 0.02
    assert found.brier.value == pytest.approx(1 / 6, abs=0.01)
    # Chance right = score: the risk of the s most certain is s / 2, and its mean over s is a quarter.
    assert found.area.value == pytest.approx(0.25, abs=0.01)
    low, high = found.area.interval
    assert low < found.area.value < high


def test_scores_outside_a_probability_are_refused():
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="wanted a probability"):
            calibration(ClusterBootstrap([0, 1]), [0.5, bad], [1, 0])
    assert calibration(ClusterBootstrap([]), [], []) is None
    assert calibration(ClusterBootstrap([0]), [1.0 + 1e-9], [1]).brier.value == 0
