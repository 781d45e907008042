"""Figures and how sure they are: means with intervals from a bootstrap over images, paired tests, calibration.

Knows arrays of numbers and the cluster (image) of each row; does not know text, models or files.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)

NUM_BINS = 15
COVERAGES = (0.5, 0.8, 0.9)
_CHUNK_ELEMENTS = 2_000_000


@dataclass(frozen=True)
class Figure:
    """A number, its 95 % interval, and the rows behind it.

    `value` is None where no row is (n = 0). `interval` is None there, where the rows come from fewer than two images
    (nothing to resample), and where no resamples were asked for.
    """

    value: float | None
    interval: tuple[float, float] | None
    n: int

    def to_dict(self, name: str = "accuracy") -> dict[str, Any]:
        return {name: self.value, "ci95": None if self.interval is None else list(self.interval), "n": self.n}


class ClusterBootstrap:
    """Resamples images, not rows: questions of one image stand or fall together, and their errors are not independent.

    Each of `num_resamples` draws as many images as there are, with replacement; a statistic's 2.5 and 97.5 percentiles
    over the draws are its interval (percentile bootstrap, Efron and Tibshirani 1993, with the image as the unit).
    The draws depend on the seed and the number of images alone, so every statistic sees the same ones, and the
    difference of two answerers on the same rows is a paired comparison. Where all rows agree (100 % right) the
    interval has no width: the bootstrap cannot know of failures it never saw.

    Args:
        clusters: the image of each row.
        num_resamples: 0 gives no intervals.
    """

    def __init__(self, clusters: Sequence[Hashable], num_resamples: int = 10_000, seed: int = 0) -> None:
        if num_resamples < 0:
            raise ValueError(f"bootstrap resamples: got {num_resamples}; wanted 0 (no intervals) or more")
        numbers: dict[Hashable, int] = {}
        index = [numbers.setdefault(c, len(numbers)) for c in clusters]
        self.index: NDArray[np.int64] = np.asarray(index, dtype=np.int64)
        self.num_rows, self.num_clusters = len(index), len(numbers)
        self.num_resamples, self.seed = num_resamples, seed

    def draws(self, width: int) -> Iterator[Floats]:
        """Chunks (resamples, clusters) of how often each cluster was drawn; chunks suit `width` numbers a resample."""
        generator = np.random.default_rng(self.seed)
        size = max(1, _CHUNK_ELEMENTS // max(1, width, self.num_clusters))
        for start in range(0, self.num_resamples if self.num_clusters else 0, size):
            num = min(size, self.num_resamples - start)
            drawn = generator.integers(0, self.num_clusters, (num, self.num_clusters))
            drawn += np.arange(num)[:, None] * self.num_clusters
            counts = np.bincount(drawn.ravel(), minlength=num * self.num_clusters)
            yield counts.reshape(num, self.num_clusters).astype(np.float64)

    def totals(self, columns: ArrayLike) -> Floats:
        """The columns' sums in each resample: (rows, K) -> (resamples, K)."""
        columns = np.asarray(columns, dtype=np.float64)
        assert columns.ndim == 2 and len(columns) == self.num_rows, f"got {columns.shape} for {self.num_rows} rows"
        sums = np.zeros((self.num_clusters, columns.shape[1]))
        np.add.at(sums, self.index, columns)
        parts = [draw @ sums for draw in self.draws(columns.shape[1])]
        return np.concatenate(parts) if parts else np.zeros((0, columns.shape[1]))

    def by_row(self, statistic: Callable[[Floats], Floats], order: NDArray[np.int64]) -> Floats:
        """A statistic of row weights, (resamples, rows in `order`) -> (resamples, K), over all resamples."""
        parts = [statistic(draw[:, self.index[order]]) for draw in self.draws(self.num_rows)]
        return np.concatenate(parts) if parts else np.zeros((0, 1))

    def figures(self, requests: Mapping[Key, tuple[ArrayLike, ArrayLike]]) -> dict[Key, Figure]:
        """Means of `values` where `mask`, each with its interval: {key: (values, mask)} -> {key: figure}."""
        if not requests:
            return {}
        masks = np.stack([np.asarray(m, dtype=bool).reshape(self.num_rows) for _, m in requests.values()], 1)
        values = np.stack([np.asarray(v, dtype=np.float64).reshape(self.num_rows) for v, _ in requests.values()], 1)
        totals = self.totals(np.concatenate([np.where(masks, values, 0.0), masks], 1))
        width = len(requests)
        with np.errstate(invalid="ignore"):
            means = totals[:, :width] / totals[:, width:]
        found: dict[Key, Figure] = {}
        for i, key in enumerate(requests):
            n = int(masks[:, i].sum())
            value = float(values[masks[:, i], i].mean()) if n else None
            enough = len(np.unique(self.index[masks[:, i]])) > 1
            found[key] = Figure(value, percentiles(means[:, i]) if enough else None, n)
        return found

    def mean(self, values: ArrayLike, mask: ArrayLike | None = None) -> Figure:
        """One figure: the mean of `values` where `mask`."""
        return self.figures({0: (values, np.ones(self.num_rows, bool) if mask is None else mask)})[0]


def percentiles(statistics: Floats) -> tuple[float, float] | None:
    """The middle 95 % of a statistic over the resamples; those without a value (no row was drawn) are left out."""
    known = statistics[np.isfinite(statistics)]
    if not known.size:
        return None
    low, high = np.percentile(known, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """A against B on the same rows: how often only one was right, McNemar's exact two-sided p, the difference A - B."""

    only_a: int
    only_b: int
    p_value: float
    difference: Figure

    def to_dict(self) -> dict[str, Any]:
        return {
            "difference": self.difference.to_dict("value"),
            "mcnemar": {"only_this": self.only_a, "only_other": self.only_b, "p_value": self.p_value},
        }


def mcnemar_exact(a: ArrayLike, b: ArrayLike) -> tuple[int, int, float]:
    """(only a right, only b right, p): among rows where one alone is right, is each as likely as the other? Binomial.

    The test takes rows as independent, which questions of one image are not: the interval of the difference
    (clustered) is the safer reading where the two disagree.
    """
    from scipy.stats import binomtest

    right_a, right_b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    if only_a + only_b == 0:
        return 0, 0, 1.0
    return only_a, only_b, float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired(bootstrap: ClusterBootstrap, a: ArrayLike, b: ArrayLike) -> Paired:
    """Compares two answerers' right and wrong on the same rows, in the same order."""
    only_a, only_b, p_value = mcnemar_exact(a, b)
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return Paired(only_a, only_b, p_value, bootstrap.mean(difference))


def width_bins(scores: Floats, num_bins: int = NUM_BINS) -> NDArray[np.int64]:
    """The bin of each score in equal steps of (0, 1], the upper edge included; 0 falls in the first."""
    edges = np.arange(1, num_bins) / num_bins
    return np.searchsorted(edges, scores, side="left")


def mass_bins(scores: Floats, num_bins: int = NUM_BINS) -> NDArray[np.int64]:
    """The bin of each score by rank, about as many rows in each; equal scores share a bin, whatever their order."""
    rank = np.searchsorted(np.sort(scores), scores, side="left")
    return rank * num_bins // max(1, len(scores))


def reliability(scores: Floats, correct: Floats, num_bins: int = NUM_BINS) -> list[dict[str, Any]]:
    """The reliability diagram's bins of equal width: bounds, rows, mean score, accuracy (both None where empty)."""
    bins = width_bins(scores, num_bins)
    rows = []
    for i in range(num_bins):
        here = bins == i
        n = int(here.sum())
        score, accuracy = (float(scores[here].mean()), float(correct[here].mean())) if n else (None, None)
        rows.append({"low": i / num_bins, "high": (i + 1) / num_bins, "n": n, "score": score, "accuracy": accuracy})
    return rows


@dataclass(frozen=True)
class Selective:
    """Risk against coverage, most certain rows first: one point a distinct score, all of its rows in or out together.

    coverage: share of rows answered; risk: share of those that are wrong; area: the mean over rows of the risk at the
    row's own score (AURC, Geifman et al. 2019; rows of equal score share one risk); accuracy: at each of COVERAGES,
    of the smallest set of most certain rows that covers at least that share.
    """

    coverage: Floats
    risk: Floats
    area: float
    accuracy: tuple[float, ...]


class RiskCoverage:
    """The risk-coverage curve of fixed scores under any row weights."""

    def __init__(self, scores: Floats, correct: Floats) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ordered = scores[self.order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self.wrong = 1.0 - correct[self.order]

    def _curves(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """Per distinct score: weight, weight so far, wrong weight so far; weights (R, rows in `order`) -> (R, D)."""
        weight = np.add.reduceat(weights, self.starts, axis=1)
        wrong = np.add.reduceat(weights * self.wrong, self.starts, axis=1)
        return weight, np.cumsum(weight, 1), np.cumsum(wrong, 1)

    def statistics(self, weights: Floats) -> Floats:
        """(R, rows in `order`) -> (R, 1 + len(COVERAGES)): the area, then the accuracy at each coverage."""
        weight, so_far, wrong = self._curves(weights)
        risk = np.divide(wrong, so_far, out=np.zeros_like(wrong), where=so_far > 0)
        total = so_far[:, -1:]
        columns = [(weight * risk).sum(1) / total[:, 0]]
        for coverage in COVERAGES:
            at = np.argmax(so_far >= coverage * total - 1e-9, 1)[:, None]
            columns.append(1.0 - np.take_along_axis(risk, at, 1)[:, 0])
        return np.stack(columns, 1)

    def selective(self) -> Selective:
        ones = np.ones((1, len(self.wrong)))
        _, so_far, wrong = self._curves(ones)
        area, *accuracy = (float(x) for x in self.statistics(ones)[0])
        return Selective(so_far[0] / len(self.wrong), wrong[0] / so_far[0], area, tuple(accuracy))


@dataclass(frozen=True)
class Calibration:
    """Whether a score of 0.8 is right 8 times in 10, and whether the certain answers are the right ones.

    ece_width, ece_mass: expected calibration error, sum over bins of share * |accuracy - mean score|, 15 bins of equal
    width or of equal mass (Naeini et al. 2015); intervals keep the bins of the sample. Absolute values make ECE, and
    more so its resamples, lean upward when bins hold few rows. brier: mean of (score - right)^2.
    """

    ece_width: Figure
    ece_mass: Figure
    brier: Figure
    mean_score: Figure
    area: Figure
    accuracy_at: dict[float, Figure]
    bins: list[dict[str, Any]]
    curve: Selective

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.brier.n,
            "ece_equal_width": self.ece_width.to_dict("value"),
            "ece_equal_mass": self.ece_mass.to_dict("value"),
            "brier": self.brier.to_dict("value"),
            "mean_score": self.mean_score.to_dict("value"),
            "aurc": self.area.to_dict("value"),
            "accuracy_at_coverage": {f"{c:.0%}": f.to_dict() for c, f in self.accuracy_at.items()},
            "reliability": self.bins,
        }


def calibration(bootstrap: ClusterBootstrap, scores: ArrayLike, correct: ArrayLike) -> Calibration | None:
    """Calibration and selective accuracy of scores in [0, 1] (slightly above 1 by rounding is cut); None without rows.

    Raises:
        ValueError: a score is not finite or clearly outside [0, 1].
    """
    given, right = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not given.size:
        return None
    outside = ~((given >= 0) & (given <= 1 + 1e-6))
    if outside.any():
        raise ValueError(f"score: got {given[outside][0]}; wanted a probability between 0 and 1 for every row")
    sure = np.minimum(given, 1.0)
    everyone = np.ones(len(sure), bool)
    means = bootstrap.figures({"brier": ((sure - right) ** 2, everyone), "score": (sure, everyone)})
    curve = RiskCoverage(sure, right)
    selective = curve.selective()
    drawn = bootstrap.by_row(curve.statistics, curve.order)

    def with_interval(value: float, column: int) -> Figure:
        enough = bootstrap.num_clusters > 1 and len(drawn)
        return Figure(value, percentiles(drawn[:, column]) if enough else None, len(sure))

    return Calibration(
        ece_width=_ece(bootstrap, right - sure, width_bins(sure)),
        ece_mass=_ece(bootstrap, right - sure, mass_bins(sure)),
        brier=means["brier"],
        mean_score=means["score"],
        area=with_interval(selective.area, 0),
        accuracy_at={
            c: with_interval(a, i + 1) for i, (c, a) in enumerate(zip(COVERAGES, selective.accuracy, strict=True))
        },
        bins=reliability(sure, right),
        curve=selective,
    )


def _ece(bootstrap: ClusterBootstrap, gap: Floats, bins: NDArray[np.int64]) -> Figure:
    """sum over bins of |sum of (right - score)| / rows, and the same in each resample."""
    columns = np.zeros((len(gap), NUM_BINS + 1))
    columns[np.arange(len(gap)), bins] = gap
    columns[:, -1] = 1.0
    value = float(np.abs(columns[:, :-1].sum(0)).sum() / len(gap))
    interval = None
    if bootstrap.num_clusters > 1:
        totals = bootstrap.totals(columns)
        interval = percentiles(np.abs(totals[:, :-1]).sum(1) / totals[:, -1])
    return Figure(value, interval, len(gap))
