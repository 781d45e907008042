"""One evaluation from end to end: answers joined to questions, every protocol, baselines, breakdown, calibration.

Knows samples and an answerer that it is handed; does not know checkpoints, flags, or how a result is written.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from miss.engine.data.datasets import Sample
from miss.engine.evaluation.baselines import QuestionOnly
from miss.engine.evaluation.breakdown import MIN_CELL, cells, labels
from miss.engine.evaluation.metrics import Calibration, ClusterBootstrap, calibration, paired
from miss.engine.evaluation.predictions import Answerer, Mode, Prediction, join
from miss.engine.evaluation.protocols import Verdict, judge, normalise

DEFINITIONS = {
    "exact_match": "equal after the normaliser; open and closed by the data set's answer_type (without one: closed "
    "where the truth is yes or no); strict: equal without the normaliser",
    "original": "MISS's yes/no rule: closed where the truth is literally yes, Yes, no or No, right where the "
    "prediction is literally of that class; the original scores no open rows: here by exact_match",
    "llava_med": "open: token recall, token F1, sentence BLEU-1, after the normaliser; closed: the truth stands in "
    "the prediction as whole words",
}


@dataclass(frozen=True)
class Options:
    """What is evaluated and how: names for the record, resamples and seed, which runs stand beside the answers."""

    dataset: str
    split: str
    language: str | None = None
    num_resamples: int = 10_000
    seed: int = 0
    baselines: bool = True
    shuffled: bool = False


@dataclass
class Evaluation:
    """`metrics` as in metrics.json (JSON values only), `rows` as in predictions.jsonl."""

    metrics: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Scored:
    """Predictions in the order of the samples, and their verdicts; columns are float64 arrays, a row a sample."""

    samples: Sequence[Sample]
    predictions: list[Prediction]
    verdicts: list[Verdict]

    @classmethod
    def of(cls, samples: Sequence[Sample], predictions: list[Prediction]) -> "Scored":
        pairs = zip(samples, predictions, strict=True)
        return cls(samples, predictions, [judge(p.answer, s.answer, s.answer_type) for s, p in pairs])

    def column(self, name: str) -> NDArray[np.float64]:
        return np.asarray([float(getattr(v, name)) for v in self.verdicts])

    @property
    def closed(self) -> NDArray[np.bool_]:
        return np.asarray([v.answer_type == "closed" for v in self.verdicts], dtype=bool)

    @property
    def literal(self) -> NDArray[np.bool_]:
        return np.asarray([v.literal_class is not None for v in self.verdicts], dtype=bool)


def cluster(samples: Sequence[Sample], options: Options) -> ClusterBootstrap:
    """The bootstrap over the samples' images; a sample without an image key stands for itself."""
    keys = [("image", s.image_key) if s.image_key else ("row", i) for i, s in enumerate(samples)]
    return ClusterBootstrap(keys, options.num_resamples, options.seed)


def headline(scored: Scored, bootstrap: ClusterBootstrap) -> dict[str, Any]:
    """Exact-match accuracy: {"overall", "open", "closed"}, each {"accuracy", "ci95", "n"}."""
    exact, closed = scored.column("exact"), scored.closed
    requests = {"overall": (exact, closed | True), "open": (exact, ~closed), "closed": (exact, closed)}
    return {name: figure.to_dict() for name, figure in bootstrap.figures(requests).items()}


def protocols(scored: Scored, bootstrap: ClusterBootstrap) -> dict[str, Any]:
    """Every protocol's figures, each with its definition in words."""
    closed, literal = scored.closed, scored.literal
    everyone = closed | True
    requests = {
        ("exact_match", "strict", "accuracy"): (scored.column("strict"), everyone),
        ("original", "overall", "accuracy"): (scored.column("original"), everyone),
        ("original", "open", "accuracy"): (scored.column("original"), ~literal),
        ("original", "closed", "accuracy"): (scored.column("original"), literal),
        ("llava_med", "open", "recall"): (scored.column("recall"), ~closed),
        ("llava_med", "open", "f1"): (scored.column("f1"), ~closed),
        ("llava_med", "open", "bleu1"): (scored.column("bleu1"), ~closed),
        ("llava_med", "closed", "accuracy"): (scored.column("contains"), closed),
    }
    figures = bootstrap.figures(requests)
    found: dict[str, Any] = {name: {"definition": text} for name, text in DEFINITIONS.items()}
    found["exact_match"] |= headline(scored, bootstrap)
    for (protocol, part, measure), figure in figures.items():
        if protocol == "llava_med" and part == "open":
            found[protocol].setdefault(part, {})[measure] = figure.to_dict("value")
        else:
            found[protocol][part] = figure.to_dict(measure)
    return found


def breakdown(scored: Scored, bootstrap: ClusterBootstrap, train: Sequence[Sample] | None) -> dict[str, Any]:
    """Exact-match accuracy by dimension and cell; cells under MIN_CELL rows are counted, not shown."""
    answers = None if train is None else {normalise(s.answer) for s in train}
    columns = labels(scored.samples, answers)
    masks = {(name, cell): mask for name, column in columns.items() for cell, mask in cells(column).items()}
    exact = scored.column("exact")
    shown = {key: (exact, mask) for key, mask in masks.items() if mask.sum() >= MIN_CELL}
    figures = bootstrap.figures(shown)
    found: dict[str, Any] = {}
    for name, column in columns.items():
        small = [int(mask.sum()) for key, mask in masks.items() if key[0] == name and key not in shown]
        found[name] = {
            "cells": {
                key[1]: figure.to_dict() | {"num_images": len(np.unique(bootstrap.index[masks[key]]))}
                for key, figure in figures.items()
                if key[0] == name
            },
            "hidden": {"num_cells": len(small), "n": sum(small)},
            "unlabelled": column.count(None),
        }
    return found


def calibrate(scored: Scored, bootstrap: ClusterBootstrap, options: Options) -> dict[str, Any]:
    """Calibration and risk-coverage of the scores (curve: at most 100 points); skipped where a row has none."""
    scores = [p.score for p in scored.predictions if p.score is not None]
    missing = len(scored.predictions) - len(scores)
    if missing or not scores:
        return {"skipped": f"{missing} of {len(scored.predictions)} predictions have no score"}
    found: Calibration | None = calibration(bootstrap, scores, scored.column("exact"))
    assert found is not None, "there are scores"
    steps = np.searchsorted(found.curve.coverage, np.linspace(0.01, 1.0, 100) - 1e-9).clip(
        max=len(found.curve.coverage) - 1
    )
    points = [[float(found.curve.coverage[i]), float(found.curve.risk[i])] for i in sorted(set(steps.tolist()))]
    return found.to_dict() | {"risk_coverage": points}


def compare(scored: Scored, other: Scored, bootstrap: ClusterBootstrap) -> dict[str, Any]:
    """The other answerer's headline, and how the first does against it on the same rows."""
    changed = [
        normalise(p.answer) != normalise(q.answer) for p, q in zip(scored.predictions, other.predictions, strict=True)
    ]
    gain = paired(bootstrap, scored.column("exact"), other.column("exact"))
    return headline(other, bootstrap) | {
        "gain": gain.to_dict(),
        "answers_changed": bootstrap.mean(np.asarray(changed, dtype=np.float64)).to_dict("value"),
    }


class Runner:
    """Runs the passes of one evaluation and times them."""

    def __init__(self, samples: Sequence[Sample], options: Options) -> None:
        self.samples, self.options = samples, options
        self.bootstrap = cluster(samples, options)
        self.seconds: dict[str, float] = {}

    def ask(self, answerer: Answerer, mode: Mode) -> Scored:
        """One pass of the answerer over all samples, with a progress bar, joined by qid."""
        start = time.perf_counter()
        answers = tqdm(answerer(self.samples, mode), total=len(self.samples), desc=mode, unit="question", disable=None)
        joined = join(self.samples, answers, f"the answers of the {mode} run")
        self.seconds[mode] = time.perf_counter() - start
        return Scored.of(self.samples, joined)

    def baselines(
        self, scored: Scored, answerer: Answerer | None, train: Sequence[Sample] | None, no_train: str
    ) -> dict[str, Any]:
        """The runs that stand beside: {name: figures, or {"skipped": why}}."""
        if not self.options.baselines:
            return {"skipped": "not asked for"}
        no_model = "the answers come from a file: no model is loaded"
        found: dict[str, Any] = {}
        modes: list[Mode] = ["blank", "shuffled"] if self.options.shuffled else ["blank"]
        for mode in modes:
            if answerer is None:
                found[mode] = {"skipped": no_model}
            elif mode == "shuffled" and self.bootstrap.num_clusters < 2:
                found[mode] = {"skipped": "there is no other image to give"}
            else:
                found[mode] = compare(scored, self.ask(answerer, mode), self.bootstrap)
        if not train:
            found["question_only"] = {"skipped": no_train}
        else:
            lookup = QuestionOnly(train)
            answers = Scored.of(self.samples, lookup(self.samples))
            found["question_only"] = compare(scored, answers, self.bootstrap) | {"answered_from": dict(lookup.used)}
        return found


def evaluate(
    samples: Sequence[Sample],
    answers: Answerer | Sequence[Prediction],
    options: Options,
    train: Sequence[Sample] | None = None,
    no_train: str = "there is no training split",
    against: Sequence[Prediction] | None = None,
) -> Evaluation:
    """Evaluates answers to the samples.

    Args:
        samples: the questions, with their truths.
        answers: an answerer, or the predictions themselves (then the runs that need a model are skipped, visibly).
        options: names, resamples, seed, baselines.
        train: the training split: for the question-only baseline and seen answers; `no_train` says why there is none.
        against: another answerer's predictions on the same samples, compared pairwise.

    Raises:
        PredictionError: missing, extra or double rows.
    """
    start = time.perf_counter()
    runner = Runner(samples, options)
    answerer = answers if callable(answers) else None
    if callable(answers):
        scored = runner.ask(answers, "image")
    else:
        scored = Scored.of(samples, join(samples, answers))
    metrics: dict[str, Any] = {
        "dataset": options.dataset,
        "split": options.split,
        "language": options.language,
        "n": len(samples),
        "num_images": runner.bootstrap.num_clusters,
        **headline(scored, runner.bootstrap),
        "protocols": protocols(scored, runner.bootstrap),
        "baselines": runner.baselines(scored, answerer, train, no_train),
        "breakdown": breakdown(scored, runner.bootstrap, train),
        "calibration": calibrate(scored, runner.bootstrap, options),
        "train": _train_facts(samples, train, no_train),
        "bootstrap": {"unit": "image", "num_resamples": options.num_resamples, "seed": options.seed},
    }
    if against is not None:
        other = Scored.of(samples, join(samples, against, "the predictions to compare with"))
        metrics["against"] = compare(scored, other, runner.bootstrap)
    metrics["seconds"] = {**runner.seconds, "total": time.perf_counter() - start}
    return Evaluation(
        metrics, [_row(*parts) for parts in zip(samples, scored.predictions, scored.verdicts, strict=True)]
    )


def _train_facts(samples: Sequence[Sample], train: Sequence[Sample] | None, no_train: str) -> dict[str, Any]:
    if train is None:
        return {"skipped": no_train}
    images = {s.image_key for s in train}
    return {"n": len(train), "rows_on_training_images": sum(s.image_key in images for s in samples)}


def _row(sample: Sample, prediction: Prediction, verdict: Verdict) -> dict[str, Any]:
    return {
        "qid": sample.qid,
        "question": sample.question,
        "prediction": prediction.answer,
        "answer": sample.answer,
        "correct": verdict.exact,
        "score": prediction.score,
        "logprob": prediction.logprob,
        "seconds": prediction.seconds,
        "answer_type": verdict.answer_type,
    }


def quick_accuracy(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Headline accuracies alone, without intervals, for choosing a best checkpoint; a part without rows is left out."""
    scored = Scored.of(samples, join(samples, predictions))
    figures = headline(scored, cluster(samples, Options("", "", num_resamples=0)))
    return {name: figure["accuracy"] for name, figure in figures.items() if figure["n"]}
