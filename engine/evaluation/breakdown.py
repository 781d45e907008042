"""The parts of a data set that are scored apart: by modality, organ, question type, answer length, seen answer.

Knows samples and what training answered; does not know predictions, statistics or files.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from miss.engine.data.datasets import Sample
from miss.engine.evaluation.protocols import normalise, tokens

MIN_CELL = 10
"""Cells with fewer rows are hidden (counted, not shown): their accuracy says nothing, and it tempts."""

Labels = dict[str, list[str | None]]


def labels(samples: Sequence[Sample], train_answers: Collection[str] | None) -> Labels:
    """Dimension -> the label of each sample (None: it has none). Dimensions that label no sample are left out.

    `train_answers` are normalised; without them there is no `answer_seen`. `language` and `dataset` are there where
    there are several, `content_type` (VQA-RAD: the phrase type) where it is not the question type again.
    """
    columns: Labels = {
        "modality": [s.modality or None for s in samples],
        "organ": [s.organ or None for s in samples],
        "question_type": [s.question_type or None for s in samples],
        "answer_length": [answer_length(s.answer) for s in samples],
    }
    if any(s.content_type != s.question_type for s in samples):
        columns["content_type"] = [s.content_type or None for s in samples]
    if train_answers is not None:
        columns["answer_seen"] = ["seen" if normalise(s.answer) in train_answers else "unseen" for s in samples]
    if len({s.language for s in samples}) > 1:
        columns["language"] = [s.language or None for s in samples]
    if len({s.dataset for s in samples}) > 1:
        columns["dataset"] = [s.dataset for s in samples]
    return {name: column for name, column in columns.items() if any(column)}


def answer_length(answer: str) -> str:
    """The truth's length in normalised words, as one of four classes."""
    num = len(tokens(answer))
    if num <= 2:
        return "1 word" if num <= 1 else "2 words"
    return "3-4 words" if num <= 4 else "5 or more words"


def cells(column: Sequence[str | None]) -> dict[str, NDArray[np.bool_]]:
    """Label -> which rows carry it, by name."""
    return {name: np.asarray([c == name for c in column]) for name in sorted({c for c in column if c is not None})}
